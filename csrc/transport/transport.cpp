#include "transport/transport.h"

#include <memory>
#include <utility>

namespace hvd_backup {

void Transport::start_send_to_all(std::span<const int> peers, int tag, std::span<const std::byte> data,
                                  OnDone on_done) {
  struct Countdown {
    std::size_t left;
    OnDone on_done;
  };
  const auto countdown = std::make_shared<Countdown>(peers.size(), std::move(on_done));
  for (const int peer : peers) {
    start_send(peer, tag, data, [countdown] {
      if (--countdown->left == 0) countdown->on_done();
    });
  }
}

}  // namespace hvd_backup
