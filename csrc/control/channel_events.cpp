// What a ChannelBook does when a rank says something: notes it, and settles what has become possible.
#include "control/channel_book.h"

#include <algorithm>
#include <sstream>

namespace hvd_backup {

namespace {

constexpr char withdrawn[] = "withdrawn";

// The first line in which two descriptions differ, as "line 3: given X, expected Y".
std::string first_difference(const std::string& given, const std::string& expected) {
  std::istringstream given_lines(given), expected_lines(expected);
  for (int number = 1;; ++number) {
    std::string a, b;
    const bool has_a = static_cast<bool>(std::getline(given_lines, a));
    const bool has_b = static_cast<bool>(std::getline(expected_lines, b));
    if (!has_a && !has_b) return "equal";
    if (has_a && has_b && a == b) continue;
    return "line " + std::to_string(number) + ": given " + (has_a ? "'" + a + "'" : "nothing") + ", expected " +
           (has_b ? "'" + b + "'" : "nothing");
  }
}

constexpr const char* died = "its process has died";

}  // namespace

void ChannelBook::open(int from, const Open& message, TimeUs now) {
  RankState& rank = ranks_[static_cast<std::size_t>(from)];
  rank.opened = true;
  on_device_ = on_device_ && message.on_device;
  if (first_rank_ < 0) {
    first_rank_ = from;
    opened_at_ = now;
    if (script_ && script_->description() != description_) {
      fail("the trace that is replayed does not fit '" + name_ +
               "': " + first_difference(description_, script_->description()) +
               " by the trace. Replay with the program and the options that were recorded",
           now);
      return;
    }
  }
  if (!failure_.empty()) {
    out_.replies.push_back({from, Failed{name_, failure_}});
    return;
  }
  if (message.kind != kind_ || message.description != description_) {
    fail("rank " + std::to_string(from) + " and rank " + std::to_string(first_rank_) + " differ in '" + name_ +
             "': " + first_difference(message.description, description_) +
             ". All ranks must give the same tensors (names, shapes, dtypes, order) and the same options",
         now);
    return;
  }
  if (!wait_for_all_) {
    if (from == first_rank_) record_opened(now);
    out_.replies.push_back({from, Opened{name_, id_, proposal_, is_measured()}});
    return;
  }
  complete_opening(now);
  watch_stall(now);
}

void ChannelBook::record_opened(TimeUs now) {
  Record opened = record(Record::Event::opened, now);
  opened.kind = kind_;
  opened.options = options_;
  opened.reason = description_;
  out_.records.push_back(opened);
}

// Once all ranks that are left have asked.
void ChannelBook::complete_opening(TimeUs now) {
  for (int r = 0; r < size_; ++r) {
    if (!gone_[static_cast<std::size_t>(r)] && !ranks_[static_cast<std::size_t>(r)].opened) return;
  }
  wait_for_all_ = false;
  record_opened(now);
  for (int r = 0; r < size_; ++r) {
    if (ranks_[static_cast<std::size_t>(r)].opened)
      out_.replies.push_back({r, Opened{name_, id_, proposal_, is_measured()}});
  }
}

// Where the sender is, as it has said.
ChannelBook::RankState& ChannelBook::heard(int from, Step applied, int round) {
  RankState& rank = ranks_[static_cast<std::size_t>(from)];
  rank.applied = std::max(rank.applied, applied);
  rank.reached = std::max(rank.reached, applied);
  rank.round = std::max(rank.round, round);
  return rank;
}

void ChannelBook::arrive(int from, const Arrive& message, TimeUs now) {
  out_.groups.back(from, now);
  RankState& rank = heard(from, message.base, message.round);
  rank.away = false;
  rank.paused = false;
  rank.arrived = message.step;
  if (const auto began = std::exchange(rank.began, std::nullopt); began && chooser_) {
    chooser_->computed(from, message.step, now - *began);
  }
  const bool in_vain = script_ && !script_->takes(message.step, message.scope, from);
  const TimeUs started = std::exchange(rank.resumed_at, std::nullopt).value_or(last_opened_at_);
  rank.meets = false;  // it has seen the step, and gone on
  scopes_ = message.scopes;
  buckets_ = message.buckets;
  const bool of_earlier_round = rounds_.is_over(message.round) && message.step >= rounds_.end_of(message.round);
  const auto found = slots_.find({message.step, message.scope});
  const bool may_stand_in = found != slots_.end() && found->second.decision && found->second.decision->votes &&
                            !found->second.is_final && !in_vain && !of_earlier_round;
  if (may_stand_in) {  // whether it is dropped will be seen
    rank.on_time = is_on_time(now - started, last_took_us_);
    if (message.finite) {
      found->second.latecomers.push_back({from, now, message});
    } else {
      found->second.nonfinite.push_back(from);
      put_drop_on_record(from, message, now, now, non_finite);
    }
    tell_late(from, message.step, message.scope);
  } else if (rounds_.is_over(message.round)) {
    late(from, message, now, now, "its round is over");
  } else if (message.step < open_step_) {
    rank.on_time = message.step + 1 == open_step_ && is_on_time(now - started, last_took_us_);
    late(from, message, now, now, message.finite ? "decided without it" : non_finite);
  } else if (script_ && message.step >= script_->end()) {
    fail("the trace that is replayed ends before step " + std::to_string(message.step) + " of '" + name_ +
             "', at which rank " + std::to_string(from) + " has arrived",
         now);
  } else if (in_vain) {
    late(from, message, now, now, "as recorded");
  } else if (const auto end = rounds_.planned_end(gone_); end && message.step >= *end) {
    late(from, message, now, now, "its round is over");
  } else {
    Slot& slot = slots_[{message.step, message.scope}];
    if (slot.decision) {
      late(from, message, now, now, message.finite ? "decided without it" : non_finite);
    } else if (!message.finite && script_) {
      fail("the trace that is replayed does not fit '" + name_ + "': by it, rank " + std::to_string(from) +
               " contributes to step " + std::to_string(message.step) + ", but its gradient holds NaN or infinity",
           now);
    } else if (!message.finite) {  // it is told so when the step is decided, and can do nothing before
      slot.nonfinite.push_back(from);
      put_drop_on_record(from, message, now, now, non_finite);
    } else {
      slot.arrivals.push_back({from, now, message});
    }
  }
  settle(now);
}

bool ChannelBook::holds(const std::vector<Arrival>& arrivals, int rank) {
  return std::any_of(arrivals.begin(), arrivals.end(), [rank](const Arrival& each) { return each.rank == rank; });
}

std::optional<ChannelBook::Arrival> ChannelBook::take_from(std::vector<Arrival>& arrivals, int rank) {
  const auto found =
      std::find_if(arrivals.begin(), arrivals.end(), [rank](const Arrival& a) { return a.rank == rank; });
  if (found == arrivals.end()) return std::nullopt;
  Arrival taken = std::move(*found);
  arrivals.erase(found);
  return taken;
}

void ChannelBook::withdraw(int from, const Withdraw& message, TimeUs now) {
  const auto found = slots_.find({message.step, message.scope});
  if (found == slots_.end()) return;
  Slot& slot = found->second;
  const bool delivers = slot.decision && (slot.is_final || slot.attempt.has(from));
  std::optional<Arrival> unused = take_from(slot.latecomers, from);
  if (!unused && !slot.decision) unused = take_from(slot.arrivals, from);
  const std::optional<Arrival> gradient = unused || delivers ? std::nullopt : take_from(slot.arrivals, from);
  if (!gradient) {
    if (unused) put_drop_on_record(from, unused->message, unused->at, now, withdrawn);
    settle(now);
    return;
  }
  if (!is_replaceable()) {
    fail("rank " + std::to_string(from) + " has left in the middle of step " + std::to_string(message.step) + " of '" +
             name_ + "', " +
             (script_ ? "to which it contributes by the trace that is replayed"
                      : "which needs all ranks (no backup workers)"),
         now);
    return;
  }
  // What came with the arrivals is summed already, and the others have it: unless there are no others.
  slot.broken = slot.decision->votes || slot.arrivals.empty();
  if (slot.broken) {
    put_given_up_on_record(Record::Event::replaced, slot, {from}, "rank " + std::to_string(from) + " has withdrawn",
                           now);
    put_drop_on_record(from, gradient->message, gradient->at, now, withdrawn);
  }
  settle(now);
}

void ChannelBook::waiting(int from, const Waiting& message) {
  ranks_[static_cast<std::size_t>(from)].blocked_in = message.step;
}

Ranks ChannelBook::blocked() const {
  Ranks blocked;
  if (!failure_.empty()) return blocked;  // they have been told
  for (int r = 0; r < size_; ++r) {
    const Step step = ranks_[static_cast<std::size_t>(r)].blocked_in;
    if ((step == open_step_ && has_arrived(r)) || (is_short() && step + 1 == open_step_)) blocked.push_back(r);
  }
  return blocked;
}

bool ChannelBook::is_short() const {
  return std::any_of(slots_.begin(), slots_.end(),
                     [](const auto& entry) { return entry.second.is_short && !entry.second.is_final; });
}

bool ChannelBook::has_arrived(int rank) const {
  for (auto slot = slots_.lower_bound({open_step_, 0}); slot != slots_.end(); ++slot) {
    if (holds(slot->second.arrivals, rank)) return true;
    const Ranks& nonfinite = slot->second.nonfinite;
    if (!slot->second.decision && std::find(nonfinite.begin(), nonfinite.end(), rank) != nonfinite.end()) return true;
  }
  return false;
}

bool ChannelBook::anybody_waits() const {
  return std::any_of(slots_.lower_bound({open_step_, 0}), slots_.end(), [](const auto& entry) {
    const Slot& slot = entry.second;
    return !slot.decision && !(slot.arrivals.empty() && slot.nonfinite.empty());
  });
}

bool ChannelBook::turn_away(int rank, TimeUs now) {
  for (auto slot = slots_.lower_bound({open_step_, 0}); slot != slots_.end(); ++slot) {
    if (slot->second.decision) return false;
  }
  ranks_[static_cast<std::size_t>(rank)].turned_away = true;
  for (auto slot = slots_.lower_bound({open_step_, 0}); slot != slots_.end(); ++slot) {
    if (const auto arrival = take_from(slot->second.arrivals, rank)) {
      late(rank, arrival->message, arrival->at, now, "more ranks wait in another channel");
    }
    if (std::erase(slot->second.nonfinite, rank) > 0) tell_late(rank, slot->first.first, slot->first.second);
  }
  return true;
}

bool ChannelBook::decide_without(const Ranks& elsewhere, TimeUs now) {
  bool has_begun = false;
  for (int scope = 0; scope < scopes_; ++scope) {
    const Slot& slot = slots_[{open_step_, scope}];
    has_begun = has_begun || slot.decision;
    for (int r = 0; !slot.decision && r < size_; ++r) {
      const bool is_missing = able(r, slot) && !holds(slot.arrivals, r);
      if (is_missing && !std::binary_search(elsewhere.begin(), elsewhere.end(), r)) return false;
    }
  }
  if (!has_begun || held(now)) return false;
  for (int scope = 0; scope < scopes_; ++scope) {
    Slot& slot = slots_[{open_step_, scope}];
    if (!slot.decision)
      decide(scope, slot, "too few gradients are finite, and all others wait in another channel", now);
  }
  advance_open_step(now);
  settle(now);
  return true;
}

void ChannelBook::done(int from, const Done& message, TimeUs now) {
  const auto found = slots_.find({message.step, message.scope});
  if (found == slots_.end() || !found->second.decision || found->second.decision->attempt != message.attempt) return;
  Slot& slot = found->second;
  if (!slot.attempt.done(from, message.kept, now)) return;
  slot.squares += message.squares;
  RankState& rank = ranks_[static_cast<std::size_t>(from)];
  if (!slot.decision->votes) {
    rank.began = now;
    rank.reached = std::max(rank.reached, message.step + 1);
  }
  if (slot.attempt.complete() || now >= slot.attempt.overdue_at()) settle(now);
}

void ChannelBook::kept(int from, const Kept& message, TimeUs now) {
  const auto found = slots_.find({message.step, message.scope});
  if (found == slots_.end() || !found->second.attempt.has(from)) return;
  found->second.attempt.kept(from);
  if (found->second.attempt.kept()) settle(now);
}

void ChannelBook::progress(int from, const Progress& message, TimeUs now) {
  const auto found = slots_.find({message.step, message.scope});
  if (found == slots_.end() || !found->second.decision || found->second.decision->attempt != message.attempt) return;
  found->second.attempt.answered(from, message, now);
  settle(now);
}

void ChannelBook::sync(int from, const Sync& message, TimeUs now) {
  note_taken(from, message.have, now);
  RankState& rank = heard(from, message.have, message.round);
  rank.waiting = message;
  if (!rank.away && !rounds_.is_over(message.round) && message.have > rounds_.start() && is_meeting(message.have) &&
      rank.arrived < message.have) {
    rank.meets = true;
  }
  settle(now);
}

void ChannelBook::begin_round(int from, const BeginRound& message, TimeUs now) {
  RankState& rank = ranks_[static_cast<std::size_t>(from)];
  rank.round = std::max(rank.round, message.round);
  if (rounds_.is_over(message.round)) return;  // it is late for the whole round, and learns so from its Sync
  if (rounds_.followed() && rounds_.align_every() != message.align_every) {
    fail("rank " + std::to_string(from) + " follows '" + name_ +
             "' with align_every=" + std::to_string(message.align_every) + ", another rank with " +
             std::to_string(rounds_.align_every()) + ": give the same on all ranks",
         now);
    return;
  }
  rank.away = false;
  rank.meets = message.align_every > 0;
  rounds_.begin(from, message.length, message.align_every);
  settle(now);
}

void ChannelBook::away(int from, const Away& message, TimeUs now) {
  if (rounds_.is_over(message.round)) return;
  ranks_[static_cast<std::size_t>(from)].away = true;
  ranks_[static_cast<std::size_t>(from)].meets = false;
  settle(now);
}

void ChannelBook::leave(int from, int round, TimeUs now) {
  RankState& rank = ranks_[static_cast<std::size_t>(from)];
  rank.round = std::max(rank.round, round);
  if (!rounds_.is_over(round)) {
    rank.away = true;
    const bool begun = std::any_of(slots_.begin(), slots_.end(), [&](const auto& entry) {
      return entry.first.first == open_step_ && entry.second.decision;
    });
    rounds_.fix_end(open_step_ + (begun ? 1 : 0));  // a step of which a part is decided is finished first
  }
  settle(now);
}

void ChannelBook::gone(int from, const std::string& failure, TimeUs now) {
  RankState& rank = ranks_[static_cast<std::size_t>(from)];
  gone_[static_cast<std::size_t>(from)] = true;
  rank.waiting.reset();
  offers_.taken(from, -1);
  rank.failure = failure;
  Record gone = record(rank.lost ? Record::Event::lost : Record::Event::gone, now);
  gone.ranks = {from};
  gone.step = rank.reached;
  gone.reason = failure;
  out_.records.push_back(gone);
  if (!failure_.empty() || (!rank.opened && !wait_for_all_)) {
    settle(now);
    return;
  }
  const bool takes_survivors = rank.lost && kind_ == ChannelKind::collective;
  if (!failure.empty() && options_.required >= size_ && !takes_survivors) {
    fail("rank " + std::to_string(from) + " has left at step " + std::to_string(rank.reached) + " (" + failure +
             "), and '" + name_ + "' needs all ranks (no backup workers)",
         now);
    return;
  }
  if (!rank.opened) {
    if (first_rank_ >= 0) complete_opening(now);
    settle(now);
    return;
  }
  if (failure.empty() && kind_ == ChannelKind::training && !rounds_.followed()) {
    leave(from, rank.round, now);
    return;
  }
  settle(now);
}

void ChannelBook::lost(int from, TimeUs now) {
  ranks_[static_cast<std::size_t>(from)].lost = true;
  for (auto& [key, slot] : slots_) {
    std::optional<Arrival> unused = take_from(slot.latecomers, from);
    if (!unused && !slot.decision) unused = take_from(slot.arrivals, from);
    if (unused) put_drop_on_record(from, unused->message, unused->at, now, died);
    if (slot.decision) {
      slot.attempt.lost(from);
      reopen_if_nobody_has_it(slot, now);
    }
  }
  offers_.died(from);
  if (gone_[static_cast<std::size_t>(from)]) {  // it had left, but still served the others
    settle(now);
  } else {
    gone(from, died, now);
  }
  if (!failure_.empty()) return;
  if (const auto step = step_that_needs(from)) {
    fail("rank " + std::to_string(from) + " has died, and step " + std::to_string(*step) + " of '" + name_ +
             "' needs the rest of its data: it cannot be made without one of its contributors",
         now);
  } else if (const auto step = unrecoverable()) {
    fail("update " + std::to_string(*step) + " of '" + name_ + "' is lost with rank " + std::to_string(from) +
             ": who had it has died, and ranks that were late need it",
         now);
  }
}

void ChannelBook::set_paused(int rank, bool paused, TimeUs now) {
  ranks_[static_cast<std::size_t>(rank)].paused = paused;
  settle(now);
}

void ChannelBook::set_joined(int rank, bool joined, TimeUs now) {
  RankState& state = ranks_[static_cast<std::size_t>(rank)];
  state.joined = joined;
  if (joined) state.joined_in = rounds_.current();
  settle(now);
}

}  // namespace hvd_backup
