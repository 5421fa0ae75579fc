// Transfers between ranks of one node through memory that they share: the sender copies the data into a block of its
// own segment and announces it, the receiver copies them out and frees the block. Two copies by the CPU cost a fraction
// of what one copy by the kernel costs (process_vm_readv, which MPI uses where the system allows it), and no system
// call.
//
// Each rank has one segment: a ring of announcements for each other rank, written by the owner and read by that rank
// alone, and `block_count` blocks. So nobody ever waits for anybody: a rank that has stopped keeps blocks of others
// occupied, no more. When no block is free the data go the long way, over MPI, and only that is announced.
//
// What it is not: it knows no MPI; ranks are numbered within the node. Used by one thread of each rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "transport/lanes.h"
#include "transport/shared_segment.h"
#include "transport/transport.h"

namespace hvd_backup {

class NodeExchange {
 public:
  static constexpr std::size_t block_bytes = std::size_t{256} << 10;
  static constexpr std::size_t block_count = 32;
  static constexpr std::size_t least_bytes = 1;  // less than that MPI sends in one small message

  // Whether transfers of this size come here. Sender and receiver know it without asking each other.
  static bool takes(std::size_t bytes) { return bytes >= least_bytes && bytes <= block_bytes; }

  // The size of each segment on a node of `ranks` ranks. A fresh segment, all zeros, is ready to be used.
  static std::size_t segment_bytes(std::size_t ranks);

  // Receives from `peer`, over MPI, what comes next the long way with this tag.
  using ReceiveTheLongWay = std::function<void(std::size_t peer, Tag tag, std::span<std::byte> data, OnDone on_done)>;

  // segments: of all ranks of the node, by number.
  NodeExchange(std::vector<SharedSegment> segments, std::size_t self, ReceiveTheLongWay receive_the_long_way);
  NodeExchange(const NodeExchange&) = delete;
  NodeExchange& operator=(const NodeExchange&) = delete;

  // The same data to all `peers`, copied once. False when no block is free; then nothing has happened.
  bool send(std::span<const std::size_t> peers, Tag tag, std::span<const std::byte> data, const OnDone& on_done);

  // Tells `peer` that the transfer which comes next in this lane goes the long way.
  void announce(std::size_t peer, Tag tag);

  void receive(std::size_t peer, Tag tag, std::span<std::byte> data, OnDone on_done);

  // Forgets what has this tag and has not finished, receives and sends: the callbacks do not run, the blocks are free
  // again, and what a peer has not received by now it never will. What peers announce with it later is thrown away.
  void cancel(Tag tag);

  // Its process has died: nothing is wanted from it any more, and what only it was to read is free again. What others
  // were to read, too, stays with them until it is cancelled.
  void forget(std::size_t peer);

  // Moves what can be moved. Callbacks of what has finished are appended to `finished`, not run.
  void poll(std::vector<OnDone>* finished);

  // Transfers that still need this rank; data that it has sent and may forget are not among them.
  std::size_t pending() const;

 private:
  struct Segment;  // how a segment is laid out

  struct Announcement {
    Tag tag;
    std::int32_t block;        // on_the_long_way: none
    std::uint32_t generation;  // of the block
    std::uint32_t bytes;
  };
  static constexpr std::int32_t on_the_long_way = -1;

  struct Receive {
    std::span<std::byte> data;
    OnDone on_done;
  };
  using Match = Lanes<Announcement, Receive>::Match;

  struct Outgoing {
    std::size_t block;
    Tag tag;
    OnDone on_done;                        // empty: has run already
    std::optional<std::size_t> only_peer;  // that reads it
  };

  Segment segment(std::size_t rank) const;
  void post(std::size_t peer, const Announcement& announcement);
  void post_waiting(std::size_t peer);
  void reclaim_blocks();
  template <class IsWanted>
  void take_back(IsWanted is_wanted);     // blocks that are being read
  void release_block(std::size_t index);  // of outgoing_
  void deliver(std::size_t peer, std::optional<Match> match);
  bool let_go(std::size_t peer, const Announcement& announcement);

  std::vector<SharedSegment> segments_;
  const std::size_t self_;
  const ReceiveTheLongWay receive_the_long_way_;
  Lanes<Announcement, Receive> lanes_;
  std::vector<std::size_t> free_blocks_;
  std::vector<std::uint32_t> generations_;         // of this rank's blocks: counts their uses
  std::vector<Outgoing> outgoing_;                 // blocks that somebody has still to read
  std::vector<std::deque<Announcement>> waiting_;  // by peer: its ring is full
  std::vector<OnDone> finished_;
};

}  // namespace hvd_backup
