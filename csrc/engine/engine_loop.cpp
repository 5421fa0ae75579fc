// The engine thread's side: turns, messages, and what a turn finds to do. What moves data is in engine_data.cpp.
#include <sched.h>

#include "engine/engine.h"

#ifdef __linux__
#include <sys/prctl.h>
#endif

#include <algorithm>
#include <cstdio>
#include <type_traits>

namespace hvd_backup {

namespace {

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
               std::is_same_v<Body, CanGroup> || std::is_same_v<Body, Formed> || std::is_same_v<Body, Exit>;
      },
      message);
}

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

void report(int rank, const std::string& text) {
  std::fprintf(stderr, "[hvd_backup rank %d] %s\n", rank, text.c_str());
}

}  // namespace

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
    if (const DeviceWork* device = device_in_use_) pace.pending += device->pending();
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
  DeviceWork* const device = device_in_use_;
  bool worked = device != nullptr ? device->progress_of(*transport_) : transport_->progress();
  if (device != nullptr) worked = device->progress() || worked;
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
        } else if constexpr (std::is_same_v<Body, Form>) {
          if (device_) device_->form(body_of);
        } else if constexpr (std::is_same_v<Body, Disband>) {
          if (device_) device_->disband(body_of.group);
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

Engine::Work Engine::collect(TimeUs now) {
  Work work;
  const std::scoped_lock lock(mutex_);
  for (Message& message : std::exchange(outgoing_, {})) work.messages.push_back({0, std::move(message)});
  for (Channel* channel : std::exchange(dirty_, {})) {
    channel->dirty = false;
    collect(*channel, work);
  }
  if (device_) {
    for (Formed& formed : device_->take_answers()) work.messages.push_back({0, std::move(formed)});
  }
  if (coordinator_) {
    if (const auto deadline = coordinator_->next_deadline(); deadline && *deadline <= now) coordinator_->tick(now);
    for (const std::string& news : coordinator_->take_news()) report(rank_, news);
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
    if (reduction.left > 0 && is_given_up(channel, scope, reduction)) abandon(channel, reduction);
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
      if (reduction.decision.group != 0 && channel.buckets[b].layout.on_device) {
        device_->announce(reduction.decision.group, tag_of(reduction.decision, static_cast<int>(b)));
      }
      channel.journal.forget(reduction.decision.step, static_cast<int>(b));  // of an earlier attempt
    }
  }
  for (auto& [scope, reduction] : channel.reductions) {
    if (is_given_up(channel, scope, reduction)) continue;
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
