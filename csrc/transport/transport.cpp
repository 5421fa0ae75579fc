#include "transport/transport.h"

#include <memory>
#include <utility>

namespace hvd_backup {

void Transport::start_send_to_all(std::span<const int> peers, Tag tag, std::span<const std::byte> data, OnDone on_done,
                                  bool cancellable) {
  struct Countdown {
    std::size_t left;
    OnDone on_done;
  };
  const auto countdown = std::make_shared<Countdown>(peers.size(), std::move(on_done));
  for (const int peer : peers) {
    const OnDone count = [countdown] {
      if (--countdown->left == 0) countdown->on_done();
    };
    start_send(peer, tag, data, count, cancellable);
  }
}

}  // namespace hvd_backup
