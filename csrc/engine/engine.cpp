#include "engine/engine.h"

#include <sched.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/prctl.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "collective/allreduce.h"
#include "collective/partition.h"
#include "engine/payload.h"
#include "kernels/finite.h"

namespace hvd_backup {

namespace {

// A keeper that has not answered a fetch after this multiple of what the last fetch took is not waited for.
constexpr TimeUs patience_factor = 8;
constexpr TimeUs least_patience_us = 20'000;  // scheduling noise on a crowded machine

// The engine thread takes the turns when no training thread has done so for this time; it looks so often, too, until
// one has driven for long.
constexpr TimeUs handover_us = 300;
constexpr TimeUs long_drive_us = 5000;

template <class Body>
concept NamesChannelById = requires(Body body) { body.channel; };

bool is_for_coordinator(const Message& message) {
  return std::visit(
      [](const auto& body) {
        using Body = std::decay_t<decltype(body)>;
        return std::is_same_v<Body, Open> || std::is_same_v<Body, Arrive> || std::is_same_v<Body, Withdraw> ||
               std::is_same_v<Body, Waiting> || std::is_same_v<Body, Done> || std::is_same_v<Body, Kept> ||
               std::is_same_v<Body, Progress> || std::is_same_v<Body, Sync> || std::is_same_v<Body, Offered> ||
               std::is_same_v<Body, StateLost> || std::is_same_v<Body, BeginRound> || std::is_same_v<Body, Away> ||
               std::is_same_v<Body, Leave> || std::is_same_v<Body, Pause> || std::is_same_v<Body, Join> ||
               std::is_same_v<Body, Exit>;
      },
      message);
}

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

// While it lives, this thread sleeps as short as it asks for: by default Linux adds 50 us, as much as the shortest nap.
class PreciseNaps {
 public:
#ifdef __linux__
  PreciseNaps() : slack_ns_(prctl(PR_GET_TIMERSLACK)) { prctl(PR_SET_TIMERSLACK, 1000UL); }
  ~PreciseNaps() {
    if (slack_ns_ > 0) prctl(PR_SET_TIMERSLACK, static_cast<unsigned long>(slack_ns_));
  }

 private:
  const int slack_ns_;
#endif
};

double unix_s() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

void report(int rank, const std::string& text) {
  std::fprintf(stderr, "[hvd_backup rank %d] %s\n", rank, text.c_str());
}

}  // namespace

Engine::Engine(std::unique_ptr<Transport> transport, const EngineSettings& settings)
    : transport_(std::move(transport)),
      process_(getpid()),
      rank_(transport_->rank()),
      size_(transport_->size()),
      survives_losses_(transport_->survives_losses()),
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

// --- the training thread's side ----------------------------------------------------------------------------------

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
  if (!only.submitted || only.bytes() == 0 || only.bytes() > most_payload_bytes) return messages;
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
  if (spec.drop_nonfinite && spec.arrive_first) {
    throw UsageError("'" + spec.name + "': with drop_nonfinite a rank arrives with its last bucket");
  }
  channels_.push_back(std::make_unique<Channel>(spec.name, rank_, spec.kind, spec.arrive_first, spec.average));
  channels_.back()->drop_nonfinite = spec.drop_nonfinite;
  channels_.back()->resyncs = spec.options.resync;
  training_channels_ += spec.kind == ChannelKind::training ? 1 : 0;
  first_n_collectives_ += spec.kind == ChannelKind::collective && spec.options.required < size_ ? 1 : 0;
  outgoing_.push_back(Open{spec.name, spec.kind, spec.description, spec.proposal, spec.options, spec.wait_for_all});
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
  for (const BucketLayout& bucket : buckets) scopes.push_back(bucket.scope);
  channel.member.set_layout(scopes);
  for (const BucketLayout& bucket : buckets) channel.buckets.push_back({bucket, nullptr, nullptr, false});
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
  channel.reductions.clear();
  for (Bucket& bucket : channel.buckets) bucket.submitted = false;
}

// Without the mutex: it reads the whole bucket. The layout does not change any more.
bool Engine::may_count(const Channel& channel, int bucket, const void* contribution) {
  if (!channel.drop_nonfinite || bucket < 0 || bucket >= channel.gradient_buckets) return true;
  const BucketLayout& layout = channel.buckets[static_cast<std::size_t>(bucket)].layout;
  return all_finite(layout.dtype, contribution, layout.count);
}

void Engine::submit(Channel& channel, int bucket, const void* contribution, void* result, bool wait_follows) {
  const bool finite = may_count(channel, bucket, contribution);
  const std::scoped_lock lock(mutex_);
  check_usable(&channel);
  channel.member.submit(bucket, finite);
  Bucket& own = channel.buckets[static_cast<std::size_t>(bucket)];
  own.contribution = contribution;
  own.result = result;
  own.submitted = true;
  mark_dirty(channel);
  if (!wait_follows || driven_) wake();
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
    if (channel.member.next()) {
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
  transport_.reset();
}

// --- the engine thread's side ------------------------------------------------------------------------------------

void Engine::run() {
  const PreciseNaps precise;
  Pace pace{monotonic_us()};
  TimeUs lingering_since = -1;
  while (!stop_) {
    std::unique_lock lock(mutex_);
    // A drive ends without a word, and another one may follow at once: to wake this thread every time would cost more
    // than it saves, most of all where threads share cores.
    if (driven_ || (!woken_ && monotonic_us() - driven_until_ < handover_us)) {
      const auto called = [this] { return stop_ || (woken_ && !driven_); };
      if (driven_ && monotonic_us() - driven_since_ > long_drive_us) {
        asleep_ = true;
        wake_engine_.wait(lock, called);
        asleep_ = false;
      } else {
        wake_engine_.wait_for(lock, std::chrono::microseconds(handover_us), called);
      }
      pace.idle_since = std::max(pace.idle_since, driven_until_);
      continue;
    }
    lock.unlock();
    take_turn(pace);
    lock.lock();
    if (all_gone_) {
      // The last messages have to go out; what a lost peer never took is given up after a second.
      if (lingering_since < 0) lingering_since = pace.now;
      if (pace.pending == 0 || pace.now - lingering_since > 1'000'000) break;
    }
    if (!driven_) rest(lock, wake_engine_, pace, engine_thread_spins_us);
  }
  const std::scoped_lock lock(mutex_);
  ended_ = true;
  changed_.notify_all();
  for (auto& channel : channels_) channel->changed.notify_all();
}

// In the thread that waits for `channel`, with the mutex held: takes the turns until something may have come, or until
// the deadline.
void Engine::drive(std::unique_lock<std::mutex>& lock, Channel& channel, TimeUs deadline) {
  const PreciseNaps precise;
  Pace pace{monotonic_us()};
  driven_ = true;
  driven_since_ = monotonic_us();
  while (true) {
    lock.unlock();
    take_turn(pace);
    lock.lock();
    if (channel.member.next() || asks_for_state(channel)) break;
    if (!channel.failure.empty() || !failure_.empty() || stop_ || pace.now >= deadline) break;
    if (pace.worked) mark_dirty(channel);  // next() may have found something to ask for
    rest(lock, wake_driver_, pace, waiting_thread_spins_us);
  }
  driven_ = false;
  driven_until_ = pace.now;
  if (asleep_ || waiting_ > 1) wake();
}

// One turn of the loop, once whoever has the turn has ended it.
void Engine::take_turn(Pace& pace) {
  const std::scoped_lock turning(turn_mutex_);
  if (stop_) return;
  try {
    pace.worked = turn();
    pace.pending = transport_->pending();
  } catch (const std::exception& error) {
    fail("the engine of rank " + std::to_string(rank_) + " has failed: " + error.what());
    stop_ = true;
  }
  pace.now = monotonic_us();
  if (pace.worked) pace.idle_since = pace.now;
}

// Between two turns, with the mutex held.
void Engine::rest(std::unique_lock<std::mutex>& lock, std::condition_variable& called, const Pace& pace,
                  TimeUs spins_us) {
  if (std::exchange(woken_, false) || pace.worked || stop_) return;
  const bool somebody_waits = waiting_ > 0 || (coordinator_ && coordinator_->anybody_waits());
  const Expecting expecting = pace.pending > 0 ? Expecting::transfer
                              : somebody_waits ? Expecting::message
                                               : Expecting::nothing;
  TimeUs nap = nap_us(pace.now - pace.idle_since, expecting, spins_us);
  if (coordinator_) {
    if (const auto deadline = coordinator_->next_deadline())
      nap = std::min(nap, std::max<TimeUs>(*deadline - pace.now, 0));
  }
  if (nap == 0) {
    lock.unlock();
    sched_yield();
    lock.lock();
  } else {
    called.wait_for(lock, std::chrono::microseconds(nap), [this] { return woken_ || stop_; });
  }
}

// One round: completes transfers, takes messages, does what has become possible. True when there was anything.
bool Engine::turn() {
  bool worked = transport_->progress();
  const TimeUs now = monotonic_us();
  for (const int rank : transport_->take_lost()) lose(rank, now);
  int from = 0;
  Bytes body;
  while (transport_->receive_message(&from, &body)) {
    receive(from, decode(body), now);
    worked = true;
  }
  while (!to_self_.empty()) {
    const Reply own = std::move(to_self_.front());
    to_self_.pop_front();
    receive(own.to, own.message, now);
    worked = true;
  }
  if (!fetches_.empty()) tick_fetches(now);
  if (!state_fetches_.empty()) watch_state_fetches(now);
  Work work = collect(now);
  if (work.empty()) return worked;
  carry_out(std::move(work), now);
  return true;
}

// With the mutex held; null: none that this rank has opened.
Channel* Engine::find(ChannelId id) {
  const auto found = std::find_if(channels_.begin(), channels_.end(),
                                  [id](const auto& channel) { return channel->opened && channel->id == id; });
  return found == channels_.end() ? nullptr : found->get();
}

Channel& Engine::known(ChannelId id) {
  if (Channel* channel = find(id)) return *channel;
  throw RuntimeFailure("malformed message: unknown channel " + std::to_string(id));
}

// Of transfers that this rank asks for.
std::function<Tag()> Engine::next_tags() {
  return [this] { return std::exchange(next_fetch_tag_, next_fetch_tag_ + 2); };
}

// The process of a rank has died.
void Engine::lose(int rank, TimeUs now) {
  const std::scoped_lock lock(mutex_);
  if (coordinator_) {
    coordinator_->lost(rank, now);
  } else if (rank == 0) {
    lost_.push_back(rank);
    throw RuntimeFailure(
        "the process of rank 0 has died, which decides who contributes: this run cannot go on. Start it again from the "
        "last checkpoint");
  }
}

void Engine::receive(int from, const Message& message, TimeUs now) {
  if (const Pull* pull = std::get_if<Pull>(&message)) {
    serve(from, *pull);
    return;
  }
  if (const PullState* pull = std::get_if<PullState>(&message)) {
    serve(from, *pull);
    return;
  }
  const std::scoped_lock lock(mutex_);
  if (is_for_coordinator(message)) {
    if (!coordinator_) throw RuntimeFailure("malformed message: rank " + std::to_string(rank_) + " is no coordinator");
    coordinator_->receive(from, message, now);
    return;
  }
  const auto by_name = [&](const std::string& name) -> Channel* {
    for (auto& channel : channels_) {
      if (channel->name == name) return channel.get();
    }
    return nullptr;
  };
  std::visit(
      [&](const auto& body_of) {
        using Body = std::decay_t<decltype(body_of)>;
        if constexpr (std::is_same_v<Body, Opened>) {
          if (Channel* channel = by_name(body_of.name)) {
            channel->opened = true;
            channel->id = body_of.channel;
            channel->proposal = body_of.proposal;
            channel->measured = body_of.measured;
            channel->member.opened(body_of.channel);
            channel->changed.notify_all();
          }
        } else if constexpr (std::is_same_v<Body, Failed>) {
          if (Channel* channel = by_name(body_of.name)) {
            channel->failure = body_of.reason;
            for (const auto& fetch : fetches_) {
              if (channel->opened && !fetch->ended() && fetch->channel() == channel->id) give_up(*fetch);
            }
            channel->changed.notify_all();
          }
        } else if constexpr (std::is_same_v<Body, Joined>) {
          joined_ = body_of.last;
          changed_.notify_all();
        } else if constexpr (std::is_same_v<Body, Lost>) {
          lost_.push_back(body_of.rank);
        } else if constexpr (std::is_same_v<Body, AllGone>) {
          all_gone_ = true;
        } else if constexpr (std::is_same_v<Body, Refused>) {
          refused(body_of, now);
        } else if constexpr (std::is_same_v<Body, NoState>) {
          for (const auto& [channel, fetch] : state_fetches_) {
            const Resync& promised = fetch->promised();
            const bool is_it = channel->id == body_of.channel && promised.server == from;
            if (fetch->ended() || !is_it || promised.step != body_of.step) continue;
            fetch->give_up();
            channel->member.state_lost(promised);
            mark_dirty(*channel);
          }
        } else if constexpr (NamesChannelById<Body>) {
          Channel& channel = known(body_of.channel);
          if constexpr (requires { channel.member.receive(body_of); }) channel.member.receive(body_of);
          if constexpr (std::is_same_v<Body, Dismiss>) channel.offered.erase(body_of.step);
          if constexpr (std::is_same_v<Body, Probe>) answer(channel, body_of);
          if constexpr (std::is_same_v<Body, Final>) stand_in_for(channel, body_of);
          channel.journal.forget_before(channel.member.all_have());
          mark_dirty(channel);
          channel.changed.notify_all();
        }
      },
      message);
}

// How far this rank is with an attempt that others wait for.
void Engine::answer(Channel& channel, const Probe& probe) {
  Progress progress;
  progress.channel = probe.channel;
  progress.step = probe.step;
  progress.scope = probe.scope;
  progress.attempt = probe.attempt;
  if (channel.member.contributing(probe.step, probe.scope, probe.attempt)) {
    progress.unsubmitted = channel.member.unsubmitted(probe.scope);
    Missing all;
    for (const auto& collective : channel.reductions[probe.scope].collectives) {
      if (!collective) continue;
      Missing missing = collective->missing();
      all.contributions.merge(missing.contributions);
      all.results.merge(missing.results);
    }
    progress.contributions_missing.assign(all.contributions.begin(), all.contributions.end());
    progress.results_missing.assign(all.results.begin(), all.results.end());
  }
  outgoing_.push_back(std::move(progress));
}

// Some contributors have stopped: what lies ready for them they will not read any more, but fetch like late ranks; and
// what they were to keep for others is kept here.
void Engine::stand_in_for(Channel& channel, const Final& message) {
  const auto found = channel.reductions.find(message.scope);
  if (message.stopped.empty() || found == channel.reductions.end()) return;
  Reduction& reduction = found->second;
  if (reduction.decision.step != message.step || reduction.decision.attempt != message.attempt) return;
  for (const auto& collective : reduction.collectives) {
    if (collective) collective->abandon();
  }
  reduction.keeps_all = true;
  if (!channel.member.holds()) keep_for_late_ranks(channel, reduction.decision);
}

// A late rank asks for a shard that this rank keeps.
void Engine::serve(int from, const Pull& pull) {
  Journal::Block block;
  bool forgotten = false;
  {
    const std::scoped_lock lock(mutex_);
    if (Channel* channel = find(pull.channel)) {
      block = channel->journal.find(pull.step, pull.bucket, pull.shard);
      forgotten = pull.step < channel->member.all_have();
    }
  }
  if (!block) {
    send(from, Refused{pull, forgotten});
    return;
  }
  transport_->start_send(from, pull.tag, *block, [block] {});
}

// A rank beyond the journal asks for a piece of the state that this rank has offered.
void Engine::serve(int from, const PullState& pull) {
  std::shared_ptr<const State> state;
  {
    const std::scoped_lock lock(mutex_);
    if (Channel* channel = find(pull.channel)) {
      if (const auto found = channel->offered.find(pull.step); found != channel->offered.end()) state = found->second;
    }
  }
  const auto begin = static_cast<std::size_t>(pull.begin), bytes = static_cast<std::size_t>(pull.bytes);
  if (!state) {
    send(from, NoState{pull.channel, pull.step});
  } else if (begin > state->size() || bytes > state->size() - begin) {
    throw RuntimeFailure("malformed message: a piece of a state that has " + std::to_string(state->size()) + " bytes");
  } else {
    transport_->start_send(from, pull.tag, {state->data() + begin, bytes}, [state] {});
  }
}

// With the mutex held. A keeper does not have what this rank fetches: it may get it yet, unless it has fallen out of
// the journal.
void Engine::refused(const Refused& message, TimeUs now) {
  for (const auto& fetch : fetches_) {
    if (fetch->ended() || !fetch->is_of(message.pull)) continue;
    const bool resyncs = known(fetch->channel()).resyncs;
    if (!(message.forgotten && resyncs) && fetch->refused(message.pull, now)) continue;
    if (!resyncs) throw RuntimeFailure(fetch->hopeless());
    give_up(*fetch);
  }
}

// With the mutex held. Nobody keeps the update any more: the state of another rank takes its place.
void Engine::give_up(Fetch& fetch) {
  Channel& channel = known(fetch.channel());
  fetch.give_up();
  --channel.running;
  channel.member.fetch_lost(fetch.step());
  mark_dirty(channel);
  channel.changed.notify_all();
}

void Engine::start_state_fetch(Channel& channel, const Resync& promised, TimeUs now) {
  const auto done = [this, &channel](const Resync& its, std::shared_ptr<const State> state) {
    const std::scoped_lock lock(mutex_);
    if (!channel.member.state_here(its)) return;
    channel.arrived = std::move(state);
    channel.changed.notify_all();
  };
  auto fetch = std::make_shared<StateFetch>(
      *transport_, [this](int server, const PullState& pull) { send(server, pull); }, next_tags(), promised, done);
  state_fetches_.emplace_back(&channel, fetch);
  fetch->start(now);
}

void Engine::watch_state_fetches(TimeUs now) {
  std::erase_if(state_fetches_, [](const auto& each) { return each.second->ended(); });
  for (const auto& [channel, fetch] : state_fetches_) {
    if (!fetch->is_overdue(now)) continue;
    const std::scoped_lock lock(mutex_);
    channel->member.state_lost(fetch->promised());
    mark_dirty(*channel);
  }
}

Engine::Work Engine::collect(TimeUs now) {
  Work work;
  const std::scoped_lock lock(mutex_);
  for (Message& message : std::exchange(outgoing_, {})) work.messages.push_back({0, std::move(message)});
  for (Channel* channel : std::exchange(dirty_, {})) {
    channel->dirty = false;
    collect(*channel, work);
  }
  if (coordinator_) {
    if (const auto deadline = coordinator_->next_deadline(); deadline && *deadline <= now) coordinator_->tick(now);
    for (Reply& reply : coordinator_->take_replies()) work.messages.push_back(std::move(reply));
    take_records();
  }
  return work;
}

void Engine::collect(Channel& channel, Work& work) {
  if (!channel.opened) {  // its messages wait for its number
    return;
  }
  for (Message& message : take_messages(channel)) work.messages.push_back({0, std::move(message)});
  for (auto& [scope, reduction] : channel.reductions) {
    const Decision& decision = reduction.decision;
    const bool given_up = !channel.member.contributing(decision.step, scope, decision.attempt);
    if (reduction.left > 0 && given_up) abandon(channel, reduction);
  }
  for (Decision& decision : channel.member.take_reductions()) {
    Reduction& reduction = channel.reductions[decision.scope];
    reduction = {};
    reduction.decision = std::move(decision);
    reduction.started.assign(channel.buckets.size(), false);
    reduction.collectives.resize(channel.buckets.size());
    for (std::size_t b = 0; b < channel.buckets.size(); ++b) {
      if (channel.buckets[b].layout.scope != reduction.decision.scope) continue;
      ++reduction.left;
      channel.journal.forget(reduction.decision.step, static_cast<int>(b));  // of an earlier attempt
    }
  }
  for (auto& [scope, reduction] : channel.reductions) {
    if (!channel.member.contributing(reduction.decision.step, scope, reduction.decision.attempt)) continue;
    for (std::size_t b = 0; b < channel.buckets.size(); ++b) {
      if (channel.buckets[b].layout.scope != scope || !channel.buckets[b].submitted || reduction.started[b]) continue;
      reduction.started[b] = true;
      ++reduction.running;
      ++channel.running;
      work.starts.push_back({&channel, reduction.decision, static_cast<int>(b)});
    }
  }
  if (auto missed = channel.member.take_catch_up()) {
    ++channel.running;
    work.fetches.emplace_back(&channel, std::move(*missed));
  }
  for (Resync& promised : channel.member.take_resyncs()) work.resyncs.emplace_back(&channel, std::move(promised));
}

void Engine::carry_out(Work work, TimeUs now) {
  for (const Reply& reply : work.messages) send(reply.to, reply.message);
  for (const Start& start : work.starts) start_reduction(start);
  for (const auto& [channel, missed] : work.fetches) start_fetch(*channel, missed, now);
  for (const auto& [channel, promised] : work.resyncs) start_state_fetch(*channel, promised, now);
}

void Engine::send(int to, const Message& message) {
  if (to == rank_) {
    to_self_.push_back({rank_, message});
  } else {
    transport_->send_message(to, encode(message));
  }
}

void Engine::start_reduction(const Start& start) {
  const Decision& decision = start.decision;
  const Bucket& bucket = start.channel->buckets[static_cast<std::size_t>(start.bucket)];
  if (!decision.result.empty()) {
    if (decision.result.size() != bucket.bytes()) throw RuntimeFailure("malformed message: a result of another size");
    std::memcpy(bucket.result, decision.result.data(), bucket.bytes());
    bucket_reduced(*start.channel, decision, nullptr);
    return;
  }
  AllreduceOptions options;
  options.members.assign(decision.contributors.begin(), decision.contributors.end());
  options.dtype = bucket.layout.dtype;
  options.count = bucket.layout.count;
  options.contribution = bucket.contribution;
  options.result = bucket.result;
  options.tag = 2 * (decision.tag + 2 * start.bucket);
  options.result_tag = options.tag + 2;
  options.cancellable = decision.votes;
  options.staging = &staging_;
  Factors factors = factors_of(decision, options.dtype, start.channel->average);
  options.weights = std::move(factors.weights);
  options.scale = factors.scale;
  if (start.channel->measured && start.bucket < start.channel->gradient_buckets && !is_integer(options.dtype)) {
    options.norms = std::make_shared<SquaredNorms>();
  }
  const auto norms = options.norms;
  auto running = start_allreduce(*transport_, std::move(options), [this, channel = start.channel, decision, norms] {
    bucket_reduced(*channel, decision, norms.get());
  });
  const std::scoped_lock lock(mutex_);
  Reduction& reduction = start.channel->reductions[decision.scope];
  if (reduction.decision.tag == decision.tag && !reduction.collectives.empty()) {
    reduction.collectives[static_cast<std::size_t>(start.bucket)] = std::move(running);
  }
}

void Engine::bucket_reduced(Channel& channel, const Decision& decision, const SquaredNorms* norms) {
  bool complete = false;
  {
    const std::scoped_lock lock(mutex_);
    Reduction& reduction = channel.reductions[decision.scope];
    if (!channel.member.contributing(decision.step, decision.scope, decision.attempt)) return;  // given up meanwhile
    --reduction.running;
    --channel.running;
    if (norms) reduction.squares += Squares{norms->sources, norms->destination};
    complete = --reduction.left == 0;
  }
  // Before anybody hears of it: the training thread may change the result once it has it.
  if (complete && !channel.member.holds()) keep_for_late_ranks(channel, decision);
  const std::scoped_lock lock(mutex_);
  if (complete) {
    const Squares& squares = channel.reductions[decision.scope].squares;
    channel.member.reduced(decision.step, decision.scope, decision.attempt, squares);
  }
  mark_dirty(channel);
  channel.changed.notify_all();
}

// On the engine thread. This rank does not contribute to this attempt any more, or there is another one, which writes
// the same results.
void Engine::abandon(Channel& channel, Reduction& reduction) {
  for (const auto& collective : reduction.collectives) {
    if (collective) collective->abandon();
  }
  channel.running -= reduction.running;
  reduction = {};
  channel.changed.notify_all();
}

void Engine::keep_for_late_ranks(Channel& channel, const Decision& decision) {
  if (static_cast<int>(decision.contributors.size()) == size_ && !decision.votes) return;
  keep_for_late_ranks(channel, decision.step, decision.scope, decision.contributors,
                      channel.reductions[decision.scope].keeps_all);
}

// This rank's shards of the result that it has now, if it is among the contributors; or all shards.
void Engine::keep_for_late_ranks(Channel& channel, Step step, int scope, const Ranks& contributors, bool all) {
  const int k = static_cast<int>(contributors.size());
  const auto self = std::find(contributors.begin(), contributors.end(), rank_);
  if (self == contributors.end()) return;
  const int own = static_cast<int>(self - contributors.begin());
  for (std::size_t b = 0; b < channel.buckets.size(); ++b) {
    const Bucket& bucket = channel.buckets[b];
    if (bucket.layout.scope != scope) continue;
    const auto keep = [&](int shard) {
      const Shard cut = shard_of(bucket.layout.count, static_cast<std::size_t>(k), static_cast<std::size_t>(shard));
      const std::size_t size = size_of(bucket.layout.dtype);
      const auto* begin = static_cast<const std::byte*>(bucket.result) + cut.begin * size;
      channel.journal.keep(step, static_cast<int>(b), shard, {begin, cut.size() * size});
    };
    for (int shard = 0; shard < k; ++shard) {
      if (all || owner_of(shard) == own || neighbour_of(shard, k) == own) keep(shard);
    }
  }
}

void Engine::start_fetch(Channel& channel, const CatchUp& missed, TimeUs now) {
  const TimeUs patience = std::max(least_patience_us, patience_factor * fetch_us_);
  if (missed.update.step != newest_fetched_ + 1) silent_keepers_.clear();
  newest_fetched_ = missed.update.step;
  const Ranks lost_by_now = lost();
  silent_keepers_.insert(lost_by_now.begin(), lost_by_now.end());
  const auto done = [this, &channel, missed](TimeUs asked_at) {
    fetch_us_ = monotonic_us() - asked_at;
    const Step step = missed.update.step;
    for (const int scope :
         missed.scopes) {  // it may have contributed before it stopped; now it has what it owes others
      keep_for_late_ranks(channel, step, scope, missed.update.contributors[static_cast<std::size_t>(scope)], false);
    }
    const std::scoped_lock lock(mutex_);
    --channel.running;
    channel.member.fetched(step);
    mark_dirty(channel);
    channel.changed.notify_all();
  };
  auto fetch = std::make_shared<Fetch>(
      *transport_, [this](int keeper, const Pull& pull) { send(keeper, pull); }, next_tags(), channel.id, missed,
      channel.buckets, silent_keepers_, patience, done);
  fetches_.push_back(fetch);
  fetch->start(now);
}

void Engine::tick_fetches(TimeUs now) {
  std::erase_if(fetches_, [](const auto& fetch) { return fetch->ended(); });
  for (const auto& fetch : fetches_) fetch->tick(now);
  const std::scoped_lock lock(mutex_);
  for (const auto& fetch : fetches_) {
    const bool hopeless = !lost_.empty() && !fetch->ended() && fetch->is_hopeless(lost_);
    if (hopeless && known(fetch->channel()).resyncs) give_up(*fetch);
  }
}

void Engine::take_records() {
  const std::vector<Record> records = coordinator_->take_records();
  for (const Record& record : records) {
    const bool died = record.event == Record::Event::lost;
    const bool failed = record.event == Record::Event::gone && !record.reason.empty();
    if ((died || failed) && reported_gone_.insert(record.ranks.front()).second) {  // once, not for every channel
      report(rank_, "rank " + std::to_string(record.ranks.front()) +
                        (died ? " has died at step " + std::to_string(record.step) + " of '" + record.channel + "'"
                              : " has left: " + record.reason));
    }
    if (record.event == Record::Event::dropped && record.reason == non_finite &&
        reported_nonfinite_.insert(record.ranks.front()).second) {
      report(rank_, "warning: '" + record.channel + "' step " + std::to_string(record.step) +
                        ": the gradient of rank " + std::to_string(record.ranks.front()) +
                        " holds NaN or infinity and is left out (nonfinite=\"drop\"); further ones of this rank are "
                        "counted without a word");
    }
    if (record.event == Record::Event::chosen) {
      report(rank_, "'" + record.channel + "' from step " + std::to_string(record.step) + " on " + record.reason);
    }
    if (record.event == Record::Event::stopped || (record.event == Record::Event::replaced && !record.reason.empty())) {
      report(rank_, "'" + record.channel + "' step " + std::to_string(record.step) + ": " + record.reason);
    }
    if (record.event == Record::Event::held || record.event == Record::Event::stalled ||
        record.event == Record::Event::beyond)
      report(rank_, "warning: '" + record.channel + "': " + record.reason);
    if (record.event == Record::Event::resynced) report(rank_, "'" + record.channel + "': " + record.reason);
  }
  trace_.write(records);
  timeline_.write(records);
  recording_.keep(records);
}

void Engine::fail(const std::string& reason) {
  const std::scoped_lock lock(mutex_);
  failure_ = reason;
  changed_.notify_all();
  for (auto& channel : channels_) channel->changed.notify_all();
}

}  // namespace hvd_backup
