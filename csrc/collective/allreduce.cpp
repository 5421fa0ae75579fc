#include "collective/allreduce.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "base/error.h"
#include "collective/partition.h"
#include "collective/segments.h"
#include "kernels/weighted_sum.h"

namespace hvd_backup {

namespace {

// Segments on their way from this member to each other one, and back, in each phase. Enough to keep a peer busy until
// it is our turn again, and few enough in all that the memory which ranks of one node share has room for them.
std::size_t segments_in_flight(std::size_t peers) { return std::clamp<std::size_t>(16 / peers, 2, 8); }

void check(const Transport& transport, const AllreduceOptions& options) {
  const auto& members = options.members;
  if (std::adjacent_find(members.begin(), members.end(), std::greater_equal<>()) != members.end()) {
    throw UsageError("allreduce: the members must be ascending and distinct");
  }
  if (!std::binary_search(members.begin(), members.end(), transport.rank())) {
    throw UsageError("allreduce: rank " + std::to_string(transport.rank()) + " has called, but is not a member");
  }
  if (members.front() < 0 || members.back() >= transport.size()) {
    throw UsageError("allreduce: members " + std::to_string(members.front()) + " to " + std::to_string(members.back()) +
                     " among " + std::to_string(transport.size()) + " ranks");
  }
  if (options.weights.size() != members.size()) {
    throw UsageError("allreduce: " + std::to_string(options.weights.size()) + " weights for " +
                     std::to_string(members.size()) + " members");
  }
  if (options.tag < 0 || options.result_tag < 0 || options.tag == options.result_tag) {
    throw UsageError("allreduce: tags " + std::to_string(options.tag) + " and " + std::to_string(options.result_tag) +
                     ", expected two different ones, at least 0");
  }
}

// Members are named by their index among the members. Kept alive by the callbacks of its transfers.
//
// One exchange is the direct algorithm with everybody's shard being the whole buffer: then nothing has to be gathered.
class Allreduce final : public RunningAllreduce, public std::enable_shared_from_this<Allreduce> {
 public:
  Allreduce(Transport& transport, AllreduceOptions options, OnDone on_done)
      : transport_(transport),
        options_(std::move(options)),
        on_done_(std::move(on_done)),
        element_bytes_(size_of(options_.dtype)),
        size_(options_.members.size()),
        self_(index_of(transport.rank())),
        // Not count * element_bytes * (size - 1), which may overflow.
        one_exchange_(size_ == 1 || options_.count <= options_.small_bytes / (size_ - 1) / element_bytes_),
        segment_(one_exchange_
                     ? std::max<std::size_t>(options_.count, 1)
                     : segment_elements(size_, element_bytes_, options_.segment_bytes, options_.staging_bytes)),
        own_(shard(self_)),
        own_segments_(segment_count(own_, segment_)),
        peers_(size_),
        sources_(size_) {}

  ~Allreduce() override { give_back_staging(); }
  Allreduce(const Allreduce&) = delete;
  Allreduce& operator=(const Allreduce&) = delete;

  Missing missing() const override {
    Missing missing;
    if (unfinished_ == 0) return missing;
    for (std::size_t member = 0; member < size_; ++member) {
      if (member == self_) continue;
      const Peer& peer = peers_[member];
      if (peer.contributions_here < own_segments_) missing.contributions.insert(options_.members[member]);
      if (!one_exchange_ && peer.results_here < peer.segments) missing.results.insert(options_.members[member]);
    }
    return missing;
  }

  void abandon() override {
    abandoned_ = true;
    transport_.cancel(options_.tag);
    transport_.cancel(options_.result_tag);
    give_back_staging();
  }

  void start() {
    for_each_peer([this](std::size_t peer) {
      peer_ranks_.push_back(options_.members[peer]);
      peers_[peer].segments = segment_count(shard(peer), segment_);
      unfinished_ += own_segments_;                                  // contributions in
      if (!one_exchange_) unfinished_ += 2 * peers_[peer].segments;  // contributions out, results in
    });
    unfinished_ += own_segments_;  // to all at once: results out, in one exchange the contribution
    if (size_ == 1) unfinished_ = 0;
    if (unfinished_ == 0) {
      if (size_ == 1) sum(own_, 0);
      on_done_();
      return;
    }
    slots_.assign(std::min(staging_slots, own_segments_), 0);
    take_staging();
    for (std::size_t index = 0; index < slots_.size(); ++index) receive_contributions(index);
    if (one_exchange_) {
      send_to_all(options_.tag, contribution(own_));
      return;
    }
    for (std::size_t n = 0; n < segments_in_flight(size_ - 1); ++n) {
      for_each_peer([this](std::size_t peer) {
        send_next_contribution(peer);
        receive_next_result(peer);
      });
    }
  }

 private:
  struct Peer {
    std::size_t segments = 0;           // in its shard
    std::size_t contributions_out = 0;  // segments that have been started
    std::size_t results_in = 0;
    std::size_t contributions_here = 0;  // segments that have arrived
    std::size_t results_here = 0;
  };

  // A callback, which may come after the collective was abandoned.
  template <class Then>
  OnDone unless_abandoned(Then then) {
    return [self = shared_from_this(), then] {
      if (!self->abandoned_) then(*self);
    };
  }

  void give_back_staging() {
    if (options_.staging != nullptr && staging_.size > 0) {
      options_.staging->give_back(std::exchange(staging_, {}));
    }
  }

  std::size_t index_of(int rank) const {
    const auto& members = options_.members;
    return static_cast<std::size_t>(std::lower_bound(members.begin(), members.end(), rank) - members.begin());
  }

  // Each member begins with its successor, so that not everybody sends to the same one at first.
  template <class Do>
  void for_each_peer(Do action) {
    for (std::size_t step = 1; step < size_; ++step) action((self_ + step) % size_);
  }

  Shard shard(std::size_t member) const {
    return one_exchange_ ? Shard{0, options_.count} : shard_of(options_.count, size_, member);
  }

  std::span<const std::byte> contribution(Shard part) const {
    return {static_cast<const std::byte*>(options_.contribution) + part.begin * element_bytes_,
            part.size() * element_bytes_};
  }
  std::span<std::byte> result(Shard part) const {
    return {static_cast<std::byte*>(options_.result) + part.begin * element_bytes_, part.size() * element_bytes_};
  }

  void take_staging() {
    const std::size_t size = slots_.size() * (size_ - 1) * segment_ * element_bytes_;
    if (size == 0) return;
    staging_ = options_.staging != nullptr ? options_.staging->take(size) : StagingPool().take(size);
  }
  // Where the peer's part of a segment of this member's shard arrives.
  std::byte* arrival(std::size_t slot, std::size_t peer) const {
    const std::size_t index = slot * (size_ - 1) + (peer < self_ ? peer : peer - 1);
    return staging_.data.get() + index * segment_ * element_bytes_;
  }

  // Step 1: this member's contribution to the shards of the others.
  void send_next_contribution(std::size_t peer) {
    Peer& state = peers_[peer];
    if (state.contributions_out == state.segments) return;
    const Shard part = segment_of(shard(peer), segment_, state.contributions_out++);
    transport_.start_send(options_.members[peer], options_.tag, contribution(part),
                          unless_abandoned([peer](Allreduce& self) {
                            self.send_next_contribution(peer);
                            self.finish_one();
                          }),
                          options_.cancellable);
  }

  // Step 2: the others' contributions to this member's shard, a segment of it into each slot.
  void receive_contributions(std::size_t index) {
    const std::size_t slot = index % slots_.size();
    const std::size_t bytes = segment_of(own_, segment_, index).size() * element_bytes_;
    for_each_peer([&](std::size_t peer) {
      transport_.start_receive(options_.members[peer], options_.tag, {arrival(slot, peer), bytes},
                               unless_abandoned([peer, slot](Allreduce& self) {
                                 ++self.peers_[peer].contributions_here;
                                 ++self.slots_[slot];
                                 self.sum_complete_segments();
                                 self.finish_one();
                               }),
                               options_.cancellable);
    });
  }

  // Step 3: in order, because the others wait for the segments in order.
  void sum_complete_segments() {
    while (next_sum_ < own_segments_ && slots_[next_sum_ % slots_.size()] == size_ - 1) {
      const std::size_t slot = next_sum_ % slots_.size();
      const Shard part = segment_of(own_, segment_, next_sum_);
      sum(part, slot);
      slots_[slot] = 0;
      if (next_sum_ + slots_.size() < own_segments_) receive_contributions(next_sum_ + slots_.size());
      ++next_sum_;
      if (!one_exchange_) send_to_all(options_.result_tag, result(part));
    }
  }

  void sum(Shard part, std::size_t slot) {
    for (std::size_t member = 0; member < size_; ++member) {
      sources_[member] = member == self_ ? contribution(part).data() : arrival(slot, member);
    }
    const bool counts = !one_exchange_ || self_ == 0;  // in one exchange, every member sums everything
    weighted_sum(options_.dtype, result(part).data(), sources_, options_.weights, options_.scale, part.size(),
                 counts ? options_.norms.get() : nullptr);
  }

  // Step 4, and in one exchange step 1.
  void send_to_all(Tag tag, std::span<const std::byte> data) {
    transport_.start_send_to_all(peer_ranks_, tag, data, unless_abandoned([](Allreduce& self) { self.finish_one(); }),
                                 options_.cancellable);
  }

  // Step 5: the others' sums, at their place in the result.
  void receive_next_result(std::size_t peer) {
    Peer& state = peers_[peer];
    if (state.results_in == state.segments) return;
    const Shard part = segment_of(shard(peer), segment_, state.results_in++);
    transport_.start_receive(options_.members[peer], options_.result_tag, result(part),
                             unless_abandoned([peer](Allreduce& self) {
                               ++self.peers_[peer].results_here;
                               self.receive_next_result(peer);
                               self.finish_one();
                             }),
                             options_.cancellable);
  }

  void finish_one() {
    if (--unfinished_ > 0) return;
    give_back_staging();
    on_done_();
  }

  Transport& transport_;
  const AllreduceOptions options_;
  const OnDone on_done_;
  const std::size_t element_bytes_;
  const std::size_t size_;
  const std::size_t self_;
  const bool one_exchange_;
  const std::size_t segment_;  // elements
  const Shard own_;
  const std::size_t own_segments_;

  std::vector<int> peer_ranks_;
  std::vector<Peer> peers_;         // by member; this member's own is not used
  std::vector<std::size_t> slots_;  // for each, how many contributions have arrived
  std::size_t next_sum_ = 0;        // segment of this member's shard
  bool abandoned_ = false;
  std::size_t unfinished_ = 0;  // transfers, including those that have not been started
  std::vector<const void*> sources_;
  StagingPool::Block staging_;
};

}  // namespace

std::shared_ptr<RunningAllreduce> start_allreduce(Transport& transport, AllreduceOptions options, OnDone on_done) {
  check(transport, options);
  auto allreduce = std::make_shared<Allreduce>(transport, std::move(options), std::move(on_done));
  allreduce->start();
  return allreduce;
}

}  // namespace hvd_backup
