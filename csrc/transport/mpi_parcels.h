// Transfers whose data travel as messages, each with its tag in front: for those that may be cancelled. MPI holds no
// memory but ours, so a peer that has stopped holds nobody's; and what it sends when it goes on, long after the
// transfer was given up, is recognised by its tag and thrown away. The price is a copy on both sides.
#pragma once

#include <mpi.h>

#include <cstddef>
#include <span>
#include <vector>

#include "transport/lanes.h"
#include "transport/mpi_messages.h"
#include "transport/transport.h"

namespace hvd_backup {

class MpiParcels {
 public:
  explicit MpiParcels(MPI_Comm original) : messages_(original) {}  // collective: duplicates it

  // As in transport.h. Tags may be below 0.
  void send(int peer, Tag tag, std::span<const std::byte> data, OnDone on_done);
  void receive(int peer, Tag tag, std::span<std::byte> data, OnDone on_done);
  void cancel(Tag tag);
  void forget(int peer);  // its process has died

  // Callbacks of what has finished are appended to `finished`, not run.
  void progress(std::vector<OnDone>* finished);
  std::size_t pending() const { return messages_.pending() + lanes_.request_count() + finished_.size(); }

 private:
  struct Receive {
    std::span<std::byte> data;
    OnDone on_done;
  };
  using ParcelLanes = Lanes<Bytes, Receive>;

  void deliver(int peer, Tag tag, std::optional<ParcelLanes::Match> match);

  MpiMessages messages_;
  ParcelLanes lanes_;
  std::vector<OnDone> finished_;
};

}  // namespace hvd_backup
