// The training thread's side: what is handed over, and what is waited for.
#include "engine/engine.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "engine/payload.h"
#include "kernels/finite.h"

namespace hvd_backup {

namespace {

// Counts one more while it lives.
class Raised {
 public:
  explicit Raised(int& counter) : counter_(counter) { ++counter_; }
  ~Raised() { --counter_; }
  Raised(const Raised&) = delete;
  Raised& operator=(const Raised&) = delete;

 private:
  int& counter_;
};

double unix_s() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

}  // namespace

Engine::Engine(std::unique_ptr<Transport> transport, const EngineSettings& settings)
    : transport_(std::move(transport)),
      process_(getpid()),
      rank_(transport_->rank()),
      size_(transport_->size()),
      survives_losses_(transport_->survives_losses()),
      takes_device_memory_(transport_->takes_device_memory()),
      header_{size_, monotonic_us(), unix_s()},
      trace_(rank_ == 0 ? settings.trace : "", header_),
      timeline_(rank_ == 0 ? settings.timeline : "", size_, header_.began_us),
      recording_(header_) {
  if (rank_ == 0) {
    coordinator_ = std::make_unique<Coordinator>(size_, !settings.trace.empty(), combine_payloads,
                                                 settings.stall_check_us, survives_losses_);
  }
  thread_ = std::thread([this] { run(); });
}

Engine::~Engine() { stop(); }

bool Engine::in_forked_child() const { return getpid() != process_; }

void Engine::check_usable(const Channel* channel) const {
  if (!failure_.empty()) throw RuntimeFailure(failure_);
  if (leaving_ || ended_) throw UsageError("the engine was shut down on rank " + std::to_string(rank_));
  if (channel && !channel->failure.empty()) throw RuntimeFailure(channel->failure);
}

void Engine::mark_dirty(Channel& channel) {
  if (!channel.dirty) dirty_.push_back(&channel);
  channel.dirty = true;
}

// To the coordinator, after everything that this rank's channels have said before.
void Engine::say(Message message) {
  for (auto& channel : channels_) {
    if (!channel->opened) continue;
    for (Message& earlier : take_messages(*channel)) outgoing_.push_back(std::move(earlier));
  }
  outgoing_.push_back(std::move(message));
}

// Small contributions go with the arrival, and come back summed with the decision: a chain of two messages, not three.
std::vector<Message> Engine::take_messages(Channel& channel) {
  std::vector<Message> messages = channel.member.take_messages();
  if (channel.buckets.size() != 1 || channel.measured) return messages;
  const Bucket& only = channel.buckets.front();
  if (!only.submitted || only.on_device || only.bytes() == 0 || only.bytes() > most_payload_bytes) return messages;
  for (Message& message : messages) {
    Arrive* arrive = std::get_if<Arrive>(&message);
    if (arrive && arrive->finite) arrive->payload = payload_of(only, channel.average);
  }
  return messages;
}

void Engine::wake() {
  woken_ = true;
  (driven_ ? wake_driver_ : wake_engine_).notify_one();
}

Channel& Engine::open(const ChannelSpec& spec) {
  const std::scoped_lock lock(mutex_);
  check_usable(nullptr);
  if (spec.options.required < 1 || spec.options.required > size_) {
    throw UsageError("'" + spec.name + "' requires " + std::to_string(spec.options.required) +
                     " contributors: give 1 to " + std::to_string(size_) + ", the number of ranks");
  }
  if (spec.options.max_lag < 1) throw UsageError("'" + spec.name + "': max_lag must be at least 1");
  for (const auto& channel : channels_) {
    if (channel->name == spec.name) throw UsageError("'" + spec.name + "' is open already");
  }
  if (spec.on_device && !device_) throw UsageError("'" + spec.name + "' has buckets on a GPU, but none is in use");
  if (spec.drop_nonfinite && spec.arrive_first) {
    throw UsageError("'" + spec.name + "': with drop_nonfinite a rank arrives with its last bucket");
  }
  channels_.push_back(std::make_unique<Channel>(spec.name, rank_, spec.kind, spec.arrive_first, spec.average));
  channels_.back()->drop_nonfinite = spec.drop_nonfinite;
  channels_.back()->resyncs = spec.options.resync;
  training_channels_ += spec.kind == ChannelKind::training ? 1 : 0;
  first_n_collectives_ += spec.kind == ChannelKind::collective && spec.options.required < size_ ? 1 : 0;
  outgoing_.push_back(
      Open{spec.name, spec.kind, spec.description, spec.proposal, spec.options, spec.wait_for_all, spec.on_device});
  wake();
  return *channels_.back();
}

bool Engine::opened(Channel& channel, TimeUs timeout_us) {
  std::unique_lock lock(mutex_);
  channel.changed.wait_for(lock, std::chrono::microseconds(timeout_us),
                           [&] { return channel.opened || !channel.failure.empty() || !failure_.empty(); });
  check_usable(&channel);
  return channel.opened;
}

void Engine::set_layout(Channel& channel, const std::vector<BucketLayout>& buckets) {
  const std::scoped_lock lock(mutex_);
  check_usable(&channel);
  std::vector<int> scopes;
  for (const BucketLayout& bucket : buckets) {
    scopes.push_back(bucket.scope);
    if (bucket.on_device && is_integer(bucket.dtype)) {
      throw UsageError("'" + channel.name + "': integers on the GPU, where only floating-point numbers are summed");
    }
  }
  channel.member.set_layout(scopes);
  for (const BucketLayout& bucket : buckets) channel.buckets.push_back({bucket, nullptr, nullptr, false, std::nullopt});
}

void Engine::set_results(Channel& channel, const std::vector<void*>& results) {
  const std::scoped_lock lock(mutex_);
  check_usable(&channel);
  if (results.size() != channel.buckets.size()) {
    throw UsageError("set_results(): given " + std::to_string(results.size()) + " buffers for " +
                     std::to_string(channel.buckets.size()) + " buckets");
  }
  for (std::size_t b = 0; b < results.size(); ++b) channel.buckets[b].result = results[b];
}

void Engine::measure(Channel& channel, int buckets) {
  const std::scoped_lock lock(mutex_);
  check_usable(&channel);
  channel.gradient_buckets = buckets;
}

void Engine::edit_script(const std::function<void(Script&)>& edit) {
  const std::scoped_lock lock(mutex_);
  check_usable(nullptr);
  if (!coordinator_) throw UsageError("a trace is replayed by rank 0, this is rank " + std::to_string(rank_));
  edit(coordinator_->script());
}

Ranks Engine::lost() {
  const std::scoped_lock lock(mutex_);
  return lost_;
}

std::string Engine::recorded(Step last) {
  const std::scoped_lock lock(mutex_);
  return coordinator_ ? recording_.text(last) : "";
}

void Engine::begin(Channel& channel, double samples, std::string metadata) {
  const std::scoped_lock lock(mutex_);
  check_usable(&channel);
  channel.member.begin(samples, std::move(metadata));
  std::erase_if(channel.reductions, [](const auto& each) { return each.second.left == 0; });
  for (Bucket& bucket : channel.buckets) bucket.submitted = false;
}

// Without the mutex: it reads the whole bucket. The layout does not change any more.
bool Engine::may_count(const Channel& channel, int bucket, const void* contribution) {
  if (!channel.drop_nonfinite || bucket < 0 || bucket >= channel.gradient_buckets) return true;
  const BucketLayout& layout = channel.buckets[static_cast<std::size_t>(bucket)].layout;
  return all_finite(layout.dtype, contribution, layout.count);
}

void Engine::submit(Channel& channel, int bucket, const void* contribution, void* result, bool wait_follows) {
  submit(channel, bucket, contribution, result, std::nullopt, may_count(channel, bucket, contribution), wait_follows);
}

void Engine::submit(Channel& channel, int bucket, const void* contribution, void* result, OnDevice on_device,
                    void* stream, bool wait_follows) {
  DeviceWork* device = device_in_use_;
  if (device == nullptr) throw UsageError("'" + channel.name + "': a bucket on a GPU, but none is in use");
  on_device.ready = device->device().record(stream);
  submit(channel, bucket, contribution, result, on_device, on_device.finite, wait_follows);
}

void Engine::submit(Channel& channel, int bucket, const void* contribution, void* result,
                    std::optional<OnDevice> on_device, bool finite, bool wait_follows) {
  const std::scoped_lock lock(mutex_);
  check_usable(&channel);
  const auto index = static_cast<std::size_t>(bucket);
  if (index < channel.buckets.size() && channel.buckets[index].layout.on_device != on_device.has_value()) {
    throw UsageError("'" + channel.name + "': bucket " + std::to_string(bucket) + " is " +
                     (on_device ? "not on the GPU by its layout" : "on the GPU by its layout"));
  }
  channel.member.submit(bucket, finite);
  Bucket& own = channel.buckets[index];
  own.contribution = contribution;
  own.result = result;
  own.on_device = on_device;
  own.submitted = true;
  mark_dirty(channel);
  if (!wait_follows || driven_) wake();
}

void Engine::use_device(Device& device, const std::string& means, bool journal_on_device) {
  const std::scoped_lock lock(mutex_);
  check_usable(nullptr);
  if (device_) throw UsageError("rank " + std::to_string(rank_) + " uses a GPU already");
  const bool by_mpi = means == "mpi";
  if (!by_mpi && means != "nccl") throw UsageError("GPUs exchange data by 'nccl' or 'mpi', given '" + means + "'");
  if (by_mpi && !takes_device_memory_) {
    throw UsageError("GPUs cannot exchange data by MPI: it does not take GPU memory on all ranks. Use 'nccl'");
  }
  device_ = std::make_unique<DeviceWork>(device, by_mpi ? transport_.get() : nullptr, journal_on_device, rank_);
  device_in_use_ = device_.get();
  if (coordinator_ && !by_mpi) {
    coordinator_->set_name_group([&device]() -> GroupName {
      try {
        return {device.new_group(), ""};
      } catch (const std::exception& error) {
        return {"", error.what()};
      }
    });
  }
  outgoing_.push_back(CanGroup{by_mpi ? "" : device.why_no_groups(), means});
  wake();
}

bool Engine::wait(Channel& channel, TimeUs timeout_us, Update* update) {
  std::unique_lock lock(mutex_);
  const Raised waiting(waiting_);
  const TimeUs deadline = monotonic_us() + timeout_us;
  channel.taken_over.reset();
  while (true) {
    // What is decided for good is completed and handed out, though the channel has failed since.
    check_usable(channel.member.decided() ? nullptr : &channel);
    if (asks_for_state(channel)) {  // first: this thread may be about to go elsewhere
      if (!update) return true;
      for (auto& each : channels_) each->asked_elsewhere = each->asked_elsewhere || each->member.state_wanted();
      *update = Update{Update::Kind::offer, channel.member.step(), {}, false, 0, {}, 0};
      return true;
    }
    if (channel.member.next() && !uses_what_is_given_up(channel)) {
      if (update) *update = channel.member.take();
      if (update && update->kind == Update::Kind::resync) channel.taken_over = std::move(channel.arrived);
      return true;
    }
    const TimeUs now = monotonic_us();
    if (training_channels_ > 1) channel.member.announce_waiting();
    mark_dirty(channel);  // next() may have found something to ask for
    if (now >= deadline) {
      wake();
      return false;
    }
    if (driven_) {
      wake();
      channel.changed.wait_for(lock, std::chrono::microseconds(deadline - now));
    } else {
      drive(lock, channel, deadline);
    }
  }
}

void Engine::announce_waiting(Channel& channel) {
  const std::scoped_lock lock(mutex_);
  channel.member.announce_waiting();
  mark_dirty(channel);
  wake();
}

void Engine::hold(Channel& channel) {
  const std::scoped_lock lock(mutex_);
  check_usable(&channel);
  channel.member.hold();
}

void Engine::commit(Channel& channel) {
  const std::scoped_lock lock(mutex_);
  check_usable(nullptr);
  for (const Decision& decision : channel.member.commit()) keep_for_late_ranks(channel, decision);
  mark_dirty(channel);
  wake();
}

void Engine::begin_round(Channel& channel, std::int64_t length, std::int64_t align_every) {
  const std::scoped_lock lock(mutex_);
  check_usable(&channel);
  if (align_every < 0) throw UsageError("align_every must be at least 1, given " + std::to_string(align_every));
  channel.member.begin_round(length, align_every);
  mark_dirty(channel);
  wake();
}

void Engine::away(Channel& channel) {
  const std::scoped_lock lock(mutex_);
  check_usable(&channel);
  channel.member.away();
  mark_dirty(channel);
  wake();
}

void Engine::leave(Channel& channel) {
  const std::scoped_lock lock(mutex_);
  check_usable(&channel);
  channel.member.leave();
  mark_dirty(channel);
  wake();
}

Engine::View Engine::view(Channel& channel) {
  const std::scoped_lock lock(mutex_);
  const Member& member = channel.member;
  const bool wanted = channel.resyncs && member.state_wanted();
  const bool wanted_at_exit = wanted || (channel.resyncs && member.state_will_be_wanted());
  return {member.step(),    member.round_start(), member.round_end(),      member.round_over(),
          channel.proposal, member.counters(),    channel.journal.bytes(), wanted,
          wanted_at_exit};
}

// An attempt of which this rank is not any more still uses its buffers: until the next turn.
bool Engine::uses_what_is_given_up(const Channel& channel) {
  return std::any_of(channel.reductions.begin(), channel.reductions.end(), [&](const auto& each) {
    return each.second.left > 0 && is_given_up(channel, each.first, each.second);
  });
}

bool Engine::is_given_up(const Channel& channel, int scope, const Reduction& reduction) {
  return !channel.member.contributing(reduction.decision.step, scope, reduction.decision.attempt);
}

// The state of this channel is wanted, or of another one that its thread was not asked about yet: it may be this thread
// that the others are waiting for, in another channel.
bool Engine::asks_for_state(const Channel& channel) const {
  return channel.resyncs && std::any_of(channels_.begin(), channels_.end(), [&](const auto& each) {
           return each->member.state_wanted() && (each.get() == &channel || !each->asked_elsewhere);
         });
}

void Engine::offer_state(Channel& channel, const std::vector<std::span<const std::byte>>& parts) {
  auto state = State::copy_of(parts);
  const std::scoped_lock lock(mutex_);
  check_usable(&channel);
  channel.member.offer(static_cast<std::int64_t>(state->size()));
  channel.offered[channel.member.step()] = std::move(state);
  channel.asked_elsewhere = false;
  mark_dirty(channel);
  wake();
}

std::span<const std::byte> Engine::state_taken_over(Channel& channel) {
  const std::scoped_lock lock(mutex_);
  if (!channel.taken_over) throw UsageError("there is no state to take over: wait() has not said so");
  return {channel.taken_over->data(), channel.taken_over->size()};
}

bool Engine::close(Channel& channel, TimeUs timeout_us) {
  if (in_forked_child()) return true;
  std::unique_lock lock(mutex_);
  if (ended_ || !failure_.empty()) return true;
  withdraw(channel, true);
  wake();
  return channel.changed.wait_for(lock, std::chrono::microseconds(timeout_us), [&] {
    const bool in_use = channel.running > 0 || channel.member.contributing_to_any();
    return !in_use || !channel.failure.empty() || ended_ || !failure_.empty();
  });
}

void Engine::pause() {
  const std::scoped_lock lock(mutex_);
  check_usable(nullptr);
  if (first_n_collectives_ > 0) say(Pause{});
}

void Engine::join() {
  const std::scoped_lock lock(mutex_);
  check_usable(nullptr);
  joined_.reset();
  say(Join{});
  wake();
}

bool Engine::joined(TimeUs timeout_us, int* last_rank) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, std::chrono::microseconds(timeout_us),
                    [&] { return joined_.has_value() || !failure_.empty() || ended_; });
  check_usable(nullptr);
  if (!joined_) return false;
  *last_rank = *joined_;
  return true;
}

void Engine::leave_for_good(const std::string& failure) {
  const std::scoped_lock lock(mutex_);
  if (leaving_) return;
  leaving_ = true;
  for (auto& channel : channels_) withdraw(*channel, false);
  say(Exit{failure});
  wake();
}

// Gives up what this rank has begun to contribute and will not complete; the others go on without it.
void Engine::withdraw(Channel& channel, bool also_complete) {
  channel.member.withdraw(also_complete);
  mark_dirty(channel);
}

bool Engine::shut_down(TimeUs timeout_us) {
  {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::microseconds(timeout_us), [&] { return ended_; });
    if (!ended_) return false;
  }
  stop();
  return true;
}

void Engine::stop() {
  stop_ = true;
  {
    const std::scoped_lock lock(mutex_);
    wake_engine_.notify_all();
    wake_driver_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
  const std::scoped_lock turn(turn_mutex_);  // a thread that drives has stopped, too
  if (device_ && transport_) device_->end();
  transport_.reset();
}

}  // namespace hvd_backup
