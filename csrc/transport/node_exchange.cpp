#include "transport/node_exchange.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <string>
#include <utility>

#include "base/error.h"

namespace hvd_backup {

namespace {

constexpr std::size_t cache_line = 64;
constexpr std::size_t page = 4096;
constexpr std::size_t ring_size = 128;

// While more than this many blocks are occupied, a send is done only when its block has been read: so the sender is
// slowed down to the speed of its receivers before the blocks run out.
constexpr std::size_t early_blocks = NodeExchange::block_count / 4;

static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "it has to work between processes");

// A block's state: which use of the block this is, and how many peers have still to read it. One number, so that a peer
// can let go of a use only while it lasts.
constexpr std::uint64_t block_state(std::uint32_t generation, std::size_t readers) {
  return (std::uint64_t{generation} << 32) | readers;
}
constexpr std::uint32_t generation_of(std::uint64_t state) { return static_cast<std::uint32_t>(state >> 32); }
constexpr std::uint32_t readers_of(std::uint64_t state) { return static_cast<std::uint32_t>(state); }

}  // namespace

// Zero bytes are a valid state of all of it: nothing announced, no block in use.
struct NodeExchange::Segment {
  // Of the owner, towards one peer. The counters only grow; an entry's place is its number modulo ring_size.
  struct Ring {
    alignas(cache_line) std::atomic<std::uint64_t> written;  // by the owner
    alignas(cache_line) std::atomic<std::uint64_t> read;     // by the peer
    alignas(cache_line) Announcement entries[ring_size];
  };
  struct alignas(cache_line) Block {
    std::atomic<std::uint64_t> state;
  };

  static std::size_t rings_bytes(std::size_t ranks) { return ranks * sizeof(Ring); }
  static std::size_t head_bytes(std::size_t ranks) {
    const std::size_t bytes = rings_bytes(ranks) + block_count * sizeof(Block);
    return (bytes + page - 1) / page * page;
  }

  std::byte* start;
  std::size_t ranks;

  Ring& ring_to(std::size_t peer) const { return reinterpret_cast<Ring*>(start)[peer]; }
  std::atomic<std::uint64_t>& state(std::size_t block) const {
    return reinterpret_cast<Block*>(start + rings_bytes(ranks))[block].state;
  }
  std::byte* data(std::size_t block) const { return start + head_bytes(ranks) + block * block_bytes; }
};

std::size_t NodeExchange::segment_bytes(std::size_t ranks) {
  return Segment::head_bytes(ranks) + block_count * block_bytes;
}

NodeExchange::NodeExchange(std::vector<SharedSegment> segments, std::size_t self,
                           ReceiveTheLongWay receive_the_long_way)
    : segments_(std::move(segments)),
      self_(self),
      receive_the_long_way_(std::move(receive_the_long_way)),
      generations_(block_count, 0),
      waiting_(segments_.size()) {
  for (std::size_t block = block_count; block > 0; --block) free_blocks_.push_back(block - 1);
}

NodeExchange::Segment NodeExchange::segment(std::size_t rank) const {
  return {segments_[rank].bytes().data(), segments_.size()};
}

bool NodeExchange::send(std::span<const std::size_t> peers, Tag tag, std::span<const std::byte> data,
                        const OnDone& on_done) {
  if (free_blocks_.empty()) reclaim_blocks();
  if (free_blocks_.empty()) return false;
  const std::size_t block = free_blocks_.back();
  free_blocks_.pop_back();

  std::memcpy(segment(self_).data(block), data.data(), data.size());
  const std::uint32_t generation = ++generations_[block];
  segment(self_).state(block).store(block_state(generation, peers.size()), std::memory_order_relaxed);
  for (const std::size_t peer : peers) {
    post(peer, {tag, static_cast<std::int32_t>(block), generation, static_cast<std::uint32_t>(data.size())});
  }
  const bool early = outgoing_.size() < early_blocks;  // the data have been copied: the sender may have its buffer back
  if (early) finished_.push_back(on_done);
  outgoing_.push_back(
      {block, tag, early ? OnDone() : on_done, peers.size() == 1 ? std::optional(peers.front()) : std::nullopt});
  return true;
}

void NodeExchange::announce(std::size_t peer, Tag tag) { post(peer, {tag, on_the_long_way, 0, 0}); }

void NodeExchange::receive(std::size_t peer, Tag tag, std::span<std::byte> data, OnDone on_done) {
  deliver(peer, lanes_.requested(static_cast<int>(peer), tag, {data, std::move(on_done)}));
}

void NodeExchange::cancel(Tag tag) {
  lanes_.cancel(tag, [this](int peer, const Announcement& announcement) {
    if (announcement.block != on_the_long_way) let_go(static_cast<std::size_t>(peer), announcement);
  });
  for (auto& waiting : waiting_) {
    std::erase_if(waiting, [tag](const Announcement& announcement) { return announcement.tag == tag; });
  }
  take_back([tag](const Outgoing& outgoing) { return outgoing.tag == tag; });
}

void NodeExchange::forget(std::size_t peer) {
  lanes_.forget(static_cast<int>(peer));
  waiting_[peer].clear();
  take_back([peer](const Outgoing& outgoing) { return outgoing.only_peer == peer; });
}

template <class IsWanted>
void NodeExchange::take_back(IsWanted is_wanted) {
  for (std::size_t i = outgoing_.size(); i > 0; --i) {
    if (!is_wanted(outgoing_[i - 1])) continue;
    // A new generation: who still reads the block will notice. The fence keeps what is written into it after that.
    const std::size_t block = outgoing_[i - 1].block;
    segment(self_).state(block).store(block_state(++generations_[block], 0), std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
    release_block(i - 1);
  }
}

void NodeExchange::poll(std::vector<OnDone>* finished) {
  for (std::size_t peer = 0; peer < segments_.size(); ++peer) {
    if (peer == self_) continue;
    post_waiting(peer);
    Segment::Ring& ring = segment(peer).ring_to(self_);
    const std::uint64_t written = ring.written.load(std::memory_order_acquire);
    for (std::uint64_t read = ring.read.load(std::memory_order_relaxed); read < written;) {
      const Announcement announcement = ring.entries[read % ring_size];
      ring.read.store(++read, std::memory_order_release);
      if (!lanes_.is_cancelled(announcement.tag)) {
        deliver(peer, lanes_.arrived(static_cast<int>(peer), announcement.tag, announcement));
      } else if (announcement.block != on_the_long_way) {
        let_go(peer, announcement);
      }
    }
  }
  reclaim_blocks();
  std::move(finished_.begin(), finished_.end(), std::back_inserter(*finished));
  finished_.clear();
}

std::size_t NodeExchange::pending() const {
  std::size_t count = lanes_.request_count() + finished_.size();
  for (const Outgoing& outgoing : outgoing_) count += outgoing.on_done ? 1 : 0;
  for (const auto& waiting : waiting_) count += waiting.size();
  return count;
}

void NodeExchange::post(std::size_t peer, const Announcement& announcement) {
  waiting_[peer].push_back(announcement);
  post_waiting(peer);
}

void NodeExchange::post_waiting(std::size_t peer) {
  auto& waiting = waiting_[peer];
  if (waiting.empty()) return;
  Segment::Ring& ring = segment(self_).ring_to(peer);
  std::uint64_t written = ring.written.load(std::memory_order_relaxed);
  const std::uint64_t read = ring.read.load(std::memory_order_acquire);
  for (; !waiting.empty() && written - read < ring_size; ++written) {
    ring.entries[written % ring_size] = waiting.front();
    waiting.pop_front();
  }
  ring.written.store(written, std::memory_order_release);
}

void NodeExchange::reclaim_blocks() {
  for (std::size_t i = outgoing_.size(); i > 0; --i) {
    Outgoing& outgoing = outgoing_[i - 1];
    if (readers_of(segment(self_).state(outgoing.block).load(std::memory_order_acquire)) > 0) continue;
    if (outgoing.on_done) finished_.push_back(std::move(outgoing.on_done));
    release_block(i - 1);
  }
}

void NodeExchange::release_block(std::size_t index) {
  free_blocks_.push_back(outgoing_[index].block);
  std::swap(outgoing_[index], outgoing_.back());
  outgoing_.pop_back();
}

// What was taken back consumes its receive, too: the sender has ended all with this tag, and what else it had announced
// stays with the receives that it belongs to.
void NodeExchange::deliver(std::size_t peer, std::optional<Match> match) {
  if (!match) return;
  auto& [announcement, receive] = *match;
  if (announcement.block == on_the_long_way) {
    receive_the_long_way_(peer, announcement.tag, receive.data, std::move(receive.on_done));
    return;
  }
  const auto block = static_cast<std::size_t>(announcement.block);
  if (generation_of(segment(peer).state(block).load(std::memory_order_acquire)) != announcement.generation) return;
  if (announcement.bytes != receive.data.size()) {
    throw RuntimeFailure("a transfer with tag " + std::to_string(announcement.tag) + " has " +
                         std::to_string(announcement.bytes) + " bytes, " + std::to_string(receive.data.size()) +
                         " were expected");
  }
  std::memcpy(receive.data.data(), segment(peer).data(block), receive.data.size());
  if (let_go(peer, announcement)) finished_.push_back(std::move(receive.on_done));
}

// False when the block has been taken back, so that what was read from it may be anything.
bool NodeExchange::let_go(std::size_t peer, const Announcement& announcement) {
  std::atomic<std::uint64_t>& state = segment(peer).state(static_cast<std::size_t>(announcement.block));
  std::uint64_t seen = state.load(std::memory_order_relaxed);
  do {
    if (generation_of(seen) != announcement.generation) return false;
  } while (!state.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_relaxed));
  return true;
}

}  // namespace hvd_backup
