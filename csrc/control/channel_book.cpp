#include "control/channel_book.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <sstream>

namespace hvd_backup {

namespace {

constexpr Step updates_per_page = 16;  // of one History: a late rank asks again after it has applied them

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

}  // namespace

ChannelBook::ChannelBook(ChannelId id, const Open& first, int size, TagSource tags, Outbox& out, ChannelScript* script)
    : id_(id),
      name_(first.name),
      kind_(first.kind),
      options_(first.options),
      size_(size),
      description_(first.description),
      proposal_(first.proposal),
      wait_for_all_(first.wait_for_all),
      tags_(std::move(tags)),
      out_(out),
      script_(script),
      ranks_(static_cast<std::size_t>(size)),
      gone_(static_cast<std::size_t>(size), false),
      rounds_(size),
      stall_check_(out.stall_check_us) {
  first_rank_ = -1;
  if (options_.automatic && !script_) chooser_.emplace(size, options_.required);
}

void ChannelBook::open(int from, const Open& message, TimeUs now) {
  RankState& rank = ranks_[static_cast<std::size_t>(from)];
  rank.opened = true;
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
    out_.replies.push_back({from, Opened{name_, id_, proposal_, out_.measured || options_.automatic}});
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
      out_.replies.push_back({r, Opened{name_, id_, proposal_, out_.measured || options_.automatic}});
  }
}

void ChannelBook::arrive(int from, const Arrive& message, TimeUs now) {
  RankState& rank = ranks_[static_cast<std::size_t>(from)];
  rank.applied = std::max(rank.applied, message.base);
  rank.reached = std::max(rank.reached, message.base);
  rank.round = std::max(rank.round, message.round);
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
  if (found != slots_.end() && !in_vain && !of_earlier_round) {
    Slot& slot = found->second;
    if (slot.decision && slot.decision->votes && !slot.is_final) {  // whether it is dropped will be seen
      rank.on_time = is_on_time(now - started, last_took_us_);
      slot.latecomers.push_back({from, now, message});
      tell_late(from, message.step, message.scope);
      settle(now);
      return;
    }
  }
  if (rounds_.is_over(message.round)) {
    late(from, message, now, now, "its round is over");
  } else if (message.step < open_step_) {
    rank.on_time = message.step + 1 == open_step_ && is_on_time(now - started, last_took_us_);
    late(from, message, now, now, "decided without it");
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
      late(from, message, now, now, "decided without it");
    } else {
      slot.arrivals.push_back({from, now, message});
    }
  }
  settle(now);
}

void ChannelBook::withdraw(int from, const Withdraw& message, TimeUs now) {
  const auto found = slots_.find({message.step, message.scope});
  if (found == slots_.end()) return;
  Slot& slot = found->second;
  const auto is_its_own = [&](const Arrival& arrival) { return arrival.rank == from; };
  std::erase_if(slot.latecomers, is_its_own);
  const bool delivers = slot.decision && (slot.is_final || slot.attempt.has(from));
  if (delivers || std::erase_if(slot.arrivals, is_its_own) == 0 || !slot.decision) {
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
  if (slot.broken) put_replaced_on_record(slot, {from}, "rank " + std::to_string(from) + " has withdrawn", now);
  settle(now);
}

void ChannelBook::waiting(int from, const Waiting& message) {
  ranks_[static_cast<std::size_t>(from)].blocked_in = message.step;
}

Ranks ChannelBook::blocked() const {
  Ranks blocked;
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
    for (const Arrival& arrival : slot->second.arrivals) {
      if (arrival.rank == rank) return true;
    }
  }
  return false;
}

bool ChannelBook::anybody_waits() const {
  return std::any_of(slots_.lower_bound({open_step_, 0}), slots_.end(),
                     [](const auto& entry) { return !entry.second.decision && !entry.second.arrivals.empty(); });
}

void ChannelBook::turn_away(int rank, TimeUs now) {
  for (auto slot = slots_.lower_bound({open_step_, 0}); slot != slots_.end(); ++slot) {
    if (slot->second.decision) return;  // a step that has begun goes on
  }
  ranks_[static_cast<std::size_t>(rank)].turned_away = true;
  for (auto slot = slots_.lower_bound({open_step_, 0}); slot != slots_.end(); ++slot) {
    for (const Arrival& arrival : slot->second.arrivals) {
      if (arrival.rank == rank) late(rank, arrival.message, arrival.at, now, "more ranks wait in another channel");
    }
    std::erase_if(slot->second.arrivals, [&](const Arrival& arrival) { return arrival.rank == rank; });
  }
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
  RankState& rank = ranks_[static_cast<std::size_t>(from)];
  rank.applied = std::max(rank.applied, message.have);
  rank.reached = std::max(rank.reached, message.have);
  rank.round = std::max(rank.round, message.round);
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
  rank.failure = failure;
  Record gone = record(Record::Event::gone, now);
  gone.ranks = {from};
  gone.reason = failure;
  out_.records.push_back(gone);
  if (!failure_.empty() || (!rank.opened && !wait_for_all_)) {
    settle(now);
    return;
  }
  if (!failure.empty() && options_.required >= size_) {
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

void ChannelBook::tick(TimeUs now) { settle(now); }

bool ChannelBook::able(int rank) const {
  const RankState& state = ranks_[static_cast<std::size_t>(rank)];
  if (gone_[static_cast<std::size_t>(rank)] || state.away || state.joined) return false;
  return strict() || !state.paused;
}

Step ChannelBook::all_have() const {
  Step least = open_step_;
  for (int r = 0; r < size_; ++r) {
    const auto index = static_cast<std::size_t>(r);
    const bool is_left_out = kind_ == ChannelKind::collective && ranks_[index].joined;  // does not come back to these
    if (!gone_[index] && !is_left_out) least = std::min(least, ranks_[index].applied);
  }
  return least;
}

Outlook ChannelBook::outlook_for(int rank) const {
  const int round = ranks_[static_cast<std::size_t>(rank)].round;
  const Step end = rounds_.is_over(round) ? rounds_.end_of(round) : rounds_.planned_end(gone_).value_or(-1);
  return {end, all_have()};
}

// Ranks with align_every meet at its multiples, and begin the round together: one that began later would reach the
// first meeting before it has entered its loop.
bool ChannelBook::is_meeting(Step step) const {
  const std::int64_t every = rounds_.align_every();
  return rounds_.followed() && every > 0 && (step == rounds_.start() || step % every == 0);
}

// All ranks are to meet at the open step, and not all are there.
bool ChannelBook::meeting_pending() const {
  if (!is_meeting(open_step_)) return false;
  if (all_have() < open_step_) return true;
  for (int r = 0; r < size_; ++r) {
    if (!gone_[static_cast<std::size_t>(r)] && !rounds_.has_begun(r)) return true;
  }
  return false;
}

// Why the open step may not be decided yet although enough have arrived; empty: it may.
std::optional<std::string> ChannelBook::held(TimeUs now) {
  if (meeting_pending()) return "the ranks meet at step " + std::to_string(open_step_);
  const Step least = all_have();
  if (open_step_ + 1 - least <= options_.max_lag) {
    held_reason_.clear();
    return std::nullopt;
  }
  Record held = record(Record::Event::held, now);
  for (int r = 0; r < size_; ++r) {
    const auto index = static_cast<std::size_t>(r);
    if (!gone_[index] && ranks_[index].applied == least) held.ranks.push_back(r);
  }
  held.step = open_step_;
  std::string who;
  for (int r : held.ranks) who += (who.empty() ? "" : ", ") + std::to_string(r);
  held.reason = "rank " + who + " is " + std::to_string(open_step_ - least) + " updates behind, at step " +
                std::to_string(least) + ", and the journal holds max_lag=" + std::to_string(options_.max_lag) +
                ": the others wait for it (on_max_lag=\"wait\")";
  if (held_reason_.empty()) out_.records.push_back(held);
  held_reason_ = held.reason;
  return held.reason;
}

void ChannelBook::settle(TimeUs now) {
  deadline_.reset();
  if (failure_.empty()) {
    while (watch_attempts(now) || close_round_if_ended(now) || decide_what_can(now)) {
    }
    watch_attempts(now);  // of what has been decided now
    finish_steps(now);
  }
  for (int r = 0; r < size_; ++r) answer(r, now);
  if (failure_.empty()) watch_stall(now);
}

// Its training thread can do nothing before others have done something.
bool ChannelBook::is_waiting(int rank) const {
  const RankState& state = ranks_[static_cast<std::size_t>(rank)];
  if (gone_[static_cast<std::size_t>(rank)]) return false;
  if (wait_for_all_) return state.opened;
  return state.waiting || has_arrived(rank) || contributes(rank, open_step_ - 1);
}

void ChannelBook::watch_stall(TimeUs now) {
  std::string waiting, others;
  Record stalled = record(Record::Event::stalled, now);
  for (int r = 0; r < size_; ++r) {
    if (is_waiting(r)) {
      stalled.ranks.push_back(r);
      waiting += (waiting.empty() ? "" : ", ") + std::to_string(r);
    } else if (!gone_[static_cast<std::size_t>(r)]) {
      others += (others.empty() ? "rank " : "; rank ") + std::to_string(r) + " " + whereabouts(r);
    }
  }
  std::int64_t opened = 0;
  for (const RankState& rank : ranks_) opened += rank.opened ? 1 : 0;
  const std::int64_t progress = 4 * (open_step_ + final_ + rounds_.current()) + opened;
  const auto since = stall_check_.look(!stalled.ranks.empty(), progress, now);
  if (const auto again = stall_check_.look_again()) look_again(*again);
  if (!since) return;
  stalled.step = open_step_;
  stalled.reason = (stalled.ranks.size() == 1 ? "rank " + waiting + " has" : "ranks " + waiting + " have") +
                   " waited for " + std::to_string((now - *since) / 1'000'000) + " s at step " +
                   std::to_string(open_step_) +
                   (wait_for_all_ ? " for all ranks to create it" : " (N = " + std::to_string(required()) + ")") +
                   ": " + (others.empty() ? "all ranks wait, some of them for something else" : others);
  out_.records.push_back(stalled);
}

std::string ChannelBook::whereabouts(int rank) const {
  const RankState& state = ranks_[static_cast<std::size_t>(rank)];
  if (!state.opened) return "has not created it";
  if (state.joined) return "has joined";
  if (state.paused) return "is in a full collective";
  if (state.away) return "has left the loop";
  return "is at step " + std::to_string(std::max(state.reached, state.applied)) + ", and was last heard " +
         (state.arrived < 0 ? "before its first gradient"
                            : "with its gradient for step " + std::to_string(state.arrived));
}

bool ChannelBook::close_round_if_ended(TimeUs now) {
  // Without follow too: a step that is decided in part, and whose other contributors have left, is never completed.
  bool all_away = true, all_joined = true;
  bool anybody = false;
  for (int r = 0; r < size_; ++r) {
    if (gone_[static_cast<std::size_t>(r)]) continue;
    const RankState& rank = ranks_[static_cast<std::size_t>(r)];
    anybody = true;
    all_away = all_away && (rank.away || rank.joined);
    all_joined = all_joined && rank.joined;
  }
  const auto planned = rounds_.planned_end(gone_);
  bool ended = (planned && open_step_ >= *planned) || (all_away && anybody);
  if (script_) {
    if (const auto end = script_->round_end(rounds_.current())) {
      ended = open_step_ >= *end;
      if (rounds_.followed() && planned && *planned != *end) {
        fail("the trace that is replayed does not fit '" + name_ + "': by it, the round from step " +
                 std::to_string(rounds_.start()) + " on ends at step " + std::to_string(*end) +
                 ", in this run at step " + std::to_string(*planned),
             now);
        return false;
      }
    }
  }
  if (!ended) return false;
  // The last update may still need another attempt, in which only the ranks of this round can stand in.
  const bool pending = std::any_of(slots_.begin(), slots_.lower_bound({open_step_, 0}), [](const auto& entry) {
    return entry.second.decision->votes && !entry.second.is_final;
  });
  if (pending) return false;
  dismiss_arrivals(now, "its round is over");
  Record over = record(Record::Event::round_over, now);
  over.step = open_step_;
  out_.records.push_back(over);
  rounds_.close(open_step_);
  for (RankState& rank : ranks_) {
    rank.away = false;
    rank.began.reset();
    if (rank.joined && !all_joined) rank.joined_in = rounds_.current();
  }
  return !all_joined;  // until they are back, nothing happens
}

bool ChannelBook::decide_what_can(TimeUs now) {
  if (!anybody_waits() || held(now)) return false;
  if (script_) return decide_as_scripted(now);
  bool decided_something = false;
  int decided = 0;
  for (int scope = 0; scope < scopes_; ++scope) {
    Slot& slot = slots_[{open_step_, scope}];
    if (slot.decision) {
      ++decided;
      continue;
    }
    std::vector<bool> arrived(static_cast<std::size_t>(size_), false);
    for (const Arrival& arrival : slot.arrivals) arrived[static_cast<std::size_t>(arrival.rank)] = true;
    CloseView view;
    view.required = required();
    view.arrived = static_cast<int>(slot.arrivals.size());
    for (int r = 0; r < size_; ++r) {
      if (arrived[static_cast<std::size_t>(r)]) continue;
      if (strict() && gone_[static_cast<std::size_t>(r)] && !slot.arrivals.empty()) {
        const std::string& why = ranks_[static_cast<std::size_t>(r)].failure;
        fail("rank " + std::to_string(r) + " has left" + (why.empty() ? "" : " (" + why + ")") + ", and '" + name_ +
                 "' needs all ranks",
             now);
        return false;
      }
      if (!able(r)) continue;
      const RankState& missing = ranks_[static_cast<std::size_t>(r)];
      ++view.able;
      view.owed = view.owed || (options_.max_misses > 0 && missing.misses >= options_.max_misses);
      if (missing.handicap_us && missing.on_time) {
        view.reentry_us = std::max(view.reentry_us, reentry_.wait_us(*missing.handicap_us, typical_us_));
      }
    }
    view.now = now;
    view.grace_us = options_.grace_us;
    const int needed = needed_arrivals(view.required, view.arrived, view.able);
    if (view.arrived >= needed) view.nth_arrival = slot.arrivals[static_cast<std::size_t>(needed - 1)].at;
    const Verdict verdict = close_decision(view);
    if (verdict.look_again) look_again(*verdict.look_again);
    if (!verdict.yes) continue;
    if (view.reentry_us > view.grace_us) reentry_.spend(now - *view.nth_arrival - view.grace_us);
    decide(scope, slot, verdict.reason, now);
    ++decided;
    decided_something = true;
  }
  if (decided == scopes_) advance_open_step(now);
  return decided_something;
}

// All whom the trace names have arrived: then as it says, whoever else is there.
bool ChannelBook::decide_as_scripted(TimeUs now) {
  bool decided_something = false;
  int decided = 0;
  for (int scope = 0; scope < scopes_; ++scope) {
    Slot& slot = slots_[{open_step_, scope}];
    if (slot.decision) {
      ++decided;
      continue;
    }
    const ScriptedDecision* scripted = script_->find(open_step_, scope);
    if (!scripted) continue;  // an arrival will say so
    const bool complete = slot.arrivals.size() == scripted->contributors.size();
    for (const int r : scripted->contributors) {
      if (complete || able(r)) continue;
      if (std::any_of(slot.arrivals.begin(), slot.arrivals.end(), [r](const Arrival& a) { return a.rank == r; }))
        continue;
      fail("the trace that is replayed does not fit '" + name_ + "': by it, rank " + std::to_string(r) +
               " contributes to step " + std::to_string(open_step_) + ", but it has left or its data has ended",
           now);
      return false;
    }
    if (!complete) continue;
    decide(scope, slot, "as recorded", now);
    ++decided;
    decided_something = true;
  }
  if (decided == scopes_) advance_open_step(now);
  return decided_something;
}

// Another N, if it pays, from the step on that has just opened.
void ChannelBook::choose_required(TimeUs now) {
  std::vector<TimeUs> busy_us;
  for (const RankState& rank : ranks_) busy_us.push_back(rank.began ? now - *rank.began : 0);
  const auto reason = chooser_->look(open_step_, busy_us);
  if (!reason) return;
  Record chosen = record(Record::Event::chosen, now);
  chosen.step = open_step_;
  chosen.required = chooser_->required();
  chosen.reason = *reason;
  out_.records.push_back(chosen);
}

void ChannelBook::decide(int scope, Slot& slot, const std::string& reason, TimeUs now) {
  Decision decision;
  decision.channel = id_;
  decision.step = open_step_;
  decision.scope = scope;
  decision.votes = is_replaceable();
  const ScriptedDecision* scripted = script_ ? script_->find(open_step_, scope) : nullptr;
  decision.required = scripted ? scripted->required : required();
  slot.decision = decision;
  slot.decided_at = now;
  begin_attempt(slot, reason, now);
  const Ranks& contributors = slot.decision->contributors;
  if (strict()) out_.met.insert(out_.met.end(), contributors.begin(), contributors.end());
}

// Of the slot's arrivals.
void ChannelBook::begin_attempt(Slot& slot, const std::string& reason, TimeUs now) {
  std::sort(slot.arrivals.begin(), slot.arrivals.end(),
            [](const Arrival& a, const Arrival& b) { return a.rank < b.rank; });
  Decision& decision = *slot.decision;
  decision.tag = tags_(2 * buckets_);
  set_contributors(decision, slot.arrivals);
  if (!decision.result.empty()) decision.votes = false;  // all have the result, or none
  const TimeUs patience = transfer_time_.patience_us(last_took_us_) << std::min(decision.attempt, 6);
  slot.attempt = Attempt(decision.contributors, now, patience);
  slot.squares = {};
  slot.broken = false;
  slot.is_short = false;
  Record decided = record(Record::Event::decision, now);
  decided.step = decision.step;
  decided.scope = decision.scope;
  decided.attempt = decision.attempt;
  decided.reason = reason;
  for (const Arrival& arrival : slot.arrivals) {
    decided.bases.push_back(arrival.message.base);
    decided.arrivals.push_back(arrival.at);
  }
  decided.opened_at = decision.step == open_step_ ? opened_at_ : last_opened_at_;
  decided.required = decision.required;
  decided.ranks = decision.contributors;
  decided.weights = decision.weights;
  decided.metadata = decision.metadata;
  out_.records.push_back(decided);
  for (int contributor : decision.contributors) {
    Decision personal = decision;
    personal.outlook = outlook_for(contributor);
    out_.replies.push_back({contributor, personal});
  }
}

// arrivals: in the order of ranks.
void ChannelBook::set_contributors(Decision& decision, const std::vector<Arrival>& arrivals) const {
  decision.contributors.clear();
  decision.weights.clear();
  decision.samples = 0;
  for (const Arrival& arrival : arrivals) {
    decision.contributors.push_back(arrival.rank);
    decision.weights.push_back(arrival.message.samples);
    decision.samples += arrival.message.samples;
  }
  if (kind_ == ChannelKind::training && options_.required == size_ && !arrivals.empty()) {
    const auto joined = std::count_if(ranks_.begin(), ranks_.end(), [](const RankState& rank) { return rank.joined; });
    decision.samples += static_cast<double>(joined) * decision.samples / static_cast<double>(arrivals.size());
  }
  decision.metadata = arrivals.empty() ? "" : arrivals.front().message.metadata;
  const ScriptedDecision* scripted = script_ ? script_->find(decision.step, decision.scope) : nullptr;
  if (scripted && scripted->contributors == decision.contributors) {
    decision.weights = scripted->weights;
    decision.samples = std::accumulate(decision.weights.begin(), decision.weights.end(), 0.0);
    decision.metadata = scripted->metadata;
  }
  decision.result.clear();
  std::vector<std::string> payloads;
  for (const Arrival& arrival : arrivals) {
    if (arrival.message.payload.empty()) return;
    payloads.push_back(arrival.message.payload);
  }
  if (out_.combine && !payloads.empty()) decision.result = out_.combine(decision, payloads);
}

void ChannelBook::advance_open_step(TimeUs now) {
  std::vector<int> in(static_cast<std::size_t>(size_), 0);
  for (int scope = 0; scope < scopes_; ++scope) {
    for (int r : slots_[{open_step_, scope}].decision->contributors) ++in[static_cast<std::size_t>(r)];
  }
  for (int r = 0; r < size_; ++r) {
    RankState& rank = ranks_[static_cast<std::size_t>(r)];
    rank.handicap_us.reset();
    if (in[static_cast<std::size_t>(r)] == scopes_) {
      rank.misses = 0;
      rank.on_time = true;
    } else if (able(r)) {
      ++rank.misses;
    }
  }
  last_opened_at_ = opened_at_;
  last_took_us_ = std::max<TimeUs>(1, now - opened_at_);
  // A moving average; one stall of everybody may not make later steps look young for long.
  const TimeUs most = 4 * typical_us_;
  typical_us_ = typical_us_ == 0 ? last_took_us_ : typical_us_ + (std::min(last_took_us_, most) - typical_us_) / 8;
  reentry_.step_decided(typical_us_);
  ++open_step_;
  opened_at_ = now;
  if (chooser_) choose_required(now);
}

void ChannelBook::finish_steps(TimeUs now) {
  while (final_ < open_step_) {
    PastUpdate update;
    update.step = final_;
    Record finished = record(Record::Event::final_, now);
    finished.step = final_;
    std::map<int, TimeUs> done;
    for (int scope = 0; scope < scopes_; ++scope) {
      const auto found = slots_.find({final_, scope});
      if (found == slots_.end() || !is_kept(found->second, now)) return;
      const Slot& slot = found->second;
      const Decision& decision = *slot.decision;
      update.contributors.push_back(decision.contributors);
      if (scope == 0) {
        update.samples = decision.samples;
        update.metadata = decision.metadata;
        update.required = decision.required;
        if (chooser_) chooser_->finished(now - slot.decided_at);
      }
      finished.squares += slot.squares;
      for (const auto& [rank, at] : slot.attempt.done()) done[rank] = std::max(done[rank], at);
    }
    for (const auto& [rank, at] : done) {
      finished.ranks.push_back(rank);
      finished.arrivals.push_back(at);
    }
    out_.records.push_back(finished);
    if (chooser_) chooser_->measured(finished.squares, slots_[{final_, 0}].decision->weights);
    for (int scope = 0; scope < scopes_; ++scope) slots_.erase({final_, scope});
    history_.push_back(std::move(update));
    ++final_;
    if (final_ == open_step_) opened_at_ = now;
    const Step least = all_have();
    while (!history_.empty() && history_first_ < least) {
      history_.pop_front();
      ++history_first_;
    }
  }
}

// Whether late ranks can fetch the update. Who has stopped is waited for no longer than expected.
bool ChannelBook::is_kept(const Slot& slot, TimeUs now) {
  if (slot.decision->votes && !slot.is_final) return false;
  if (slot.attempt.kept_by_all()) return true;
  if (!is_replaceable() || !slot.attempt.kept()) return false;
  if (now >= slot.attempt.overdue_at()) return true;
  look_again(slot.attempt.overdue_at());
  return false;
}

bool ChannelBook::watch_attempts(TimeUs now) {
  bool changed = false;
  for (auto& [key, slot] : slots_) {
    const bool is_open = slot.decision && slot.decision->votes && !slot.is_final;
    if (is_open || slot.broken) changed = watch(slot, now) || changed;
  }
  return changed;
}

// Ends the attempt, if it is complete or can go on without whom it waits for. Returns whether anything has changed.
bool ChannelBook::watch(Slot& slot, TimeUs now) {
  const Decision& decision = *slot.decision;
  if (slot.broken) return begin_next_attempt(slot, {}, "", now);
  if (slot.attempt.complete()) {
    if (decision.attempt == 0) transfer_time_.measured(now - slot.attempt.began());
    make_final(slot, {}, now);
    return true;
  }
  for (const int rank : slot.attempt.ask(now)) {
    out_.replies.push_back({rank, Probe{id_, decision.step, decision.scope, decision.attempt}});
  }
  const Suspicion suspicion = slot.attempt.suspicion(now);
  if (suspicion.look_again) look_again(*suspicion.look_again);
  if (suspicion.ranks.empty()) return false;
  const int holders = std::min(2, decision.required);  // so that the update survives one more
  if (!slot.attempt.complete_without(suspicion.ranks, holders)) {
    return begin_next_attempt(slot, suspicion.ranks, suspicion.reason, now);
  }
  Record stopped = record(Record::Event::stopped, now);
  stopped.step = decision.step;
  stopped.scope = decision.scope;
  stopped.attempt = decision.attempt;
  stopped.ranks = suspicion.ranks;
  stopped.reason = suspicion.reason + "; the others have the whole update";
  out_.records.push_back(stopped);
  make_final(slot, suspicion.ranks, now);
  return true;
}

// Among the contributors without the suspects, and those who have arrived since: they can't go on without this very
// update, so their gradients are still there. With fewer than N nothing changes as long as others can come; but whoever
// has withdrawn has left, and is not waited for.
bool ChannelBook::begin_next_attempt(Slot& slot, const Ranks& suspects, const std::string& reason, TimeUs now) {
  Decision& decision = *slot.decision;
  std::vector<bool> is_in(static_cast<std::size_t>(size_), false);
  std::vector<Arrival> arrivals, given_up;
  for (const Arrival& arrival : slot.arrivals) {
    const bool suspected = std::binary_search(suspects.begin(), suspects.end(), arrival.rank);
    (suspected ? given_up : arrivals).push_back(arrival);
    is_in[static_cast<std::size_t>(arrival.rank)] = !suspected;
  }
  for (const Arrival& arrival : slot.latecomers) {
    if (gone_[static_cast<std::size_t>(arrival.rank)]) continue;
    arrivals.push_back(arrival);
    is_in[static_cast<std::size_t>(arrival.rank)] = true;
  }
  int others = 0;
  for (int r = 0; r < size_; ++r) others += !is_in[static_cast<std::size_t>(r)] && able(r) ? 1 : 0;
  const int count = static_cast<int>(arrivals.size());
  slot.is_short = !slot.broken && count < needed_arrivals(decision.required, count, others);
  if (slot.is_short) return false;
  if (!given_up.empty()) put_replaced_on_record(slot, suspects, reason, now);
  for (const Arrival& arrival : slot.latecomers) {
    if (is_in[static_cast<std::size_t>(arrival.rank)]) ranks_[static_cast<std::size_t>(arrival.rank)].misses = 0;
  }
  std::erase_if(slot.latecomers, [&](const Arrival& each) { return is_in[static_cast<std::size_t>(each.rank)]; });
  for (const Arrival& arrival : given_up) {
    RankState& rank = ranks_[static_cast<std::size_t>(arrival.rank)];
    rank.misses = std::max(rank.misses, 1);
    rank.on_time = false;
    slot.latecomers.push_back(arrival);  // should it go on in time
    tell_late(arrival.rank, decision.step, decision.scope);
  }
  slot.arrivals = std::move(arrivals);
  ++decision.attempt;
  begin_attempt(slot, reason.empty() ? "the next attempt" : "the next attempt: " + reason, now);
  for (const Arrival& arrival : slot.arrivals)
    answer(arrival.rank, now);  // who stands in does not wait for it any more
  return true;
}

void ChannelBook::put_replaced_on_record(const Slot& slot, const Ranks& ranks, const std::string& reason, TimeUs now) {
  Record replaced = record(Record::Event::replaced, now);
  replaced.step = slot.decision->step;
  replaced.scope = slot.decision->scope;
  replaced.attempt = slot.decision->attempt + 1;
  replaced.ranks = ranks;
  replaced.reason = reason;
  out_.records.push_back(replaced);
}

// stopped: contributors that do not have it. The update is what they have contributed to, but they fetch it like late
// ranks.
void ChannelBook::make_final(Slot& slot, const Ranks& stopped, TimeUs now) {
  const Decision& decision = *slot.decision;
  slot.is_final = true;
  for (const int contributor : decision.contributors) {
    RankState& rank = ranks_[static_cast<std::size_t>(contributor)];
    if (std::binary_search(stopped.begin(), stopped.end(), contributor)) {
      rank.misses = std::max(rank.misses, 1);
      rank.on_time = false;
      tell_late(contributor, decision.step, decision.scope);
      continue;
    }
    rank.began = now;
    rank.reached = std::max(rank.reached, decision.step + 1);
    out_.replies.push_back(
        {contributor, Final{id_, decision.step, decision.scope, decision.attempt, stopped, outlook_for(contributor)}});
  }
  for (const Arrival& arrival : slot.latecomers) {
    put_drop_on_record(arrival.rank, arrival.message, arrival.at, now, "decided without it");
  }
  slot.latecomers.clear();
}

// The rank takes part in an attempt at this step that is not final.
bool ChannelBook::contributes(int rank, Step step) const {
  return std::any_of(slots_.lower_bound({step, 0}), slots_.lower_bound({step + 1, 0}), [rank](const auto& entry) {
    const Slot& slot = entry.second;
    if (!slot.decision || !slot.decision->votes || slot.is_final) return false;
    const Ranks& contributors = slot.decision->contributors;
    return std::binary_search(contributors.begin(), contributors.end(), rank);
  });
}

// An attempt at this step is given up, and this rank could contribute to the next one.
bool ChannelBook::lacks(Step step, int rank) const {
  if (kind_ != ChannelKind::training || ranks_[static_cast<std::size_t>(rank)].arrived >= step || !able(rank)) {
    return false;
  }
  return std::any_of(slots_.lower_bound({step, 0}), slots_.lower_bound({step + 1, 0}),
                     [](const auto& entry) { return entry.second.is_short && !entry.second.is_final; });
}

void ChannelBook::answer(int to, TimeUs now) {
  RankState& rank = ranks_[static_cast<std::size_t>(to)];
  if (!rank.waiting || gone_[static_cast<std::size_t>(to)]) return;
  const Step have = rank.waiting->have;
  const int round = std::max(rank.waiting->round, rank.joined_in);
  const auto reply = [&](auto message) {
    rank.waiting.reset();
    message.channel = id_;
    message.outlook = outlook_for(to);
    out_.replies.push_back({to, message});
  };
  if (!failure_.empty()) {
    rank.waiting.reset();
    out_.replies.push_back({to, Failed{name_, failure_}});
    return;
  }
  if (std::exchange(rank.meets, false)) {  // also when the others have gone on meanwhile
    reply(Resume{});
    return;
  }
  const auto begin = [&] {
    rank.began = now;
    reply(Resume{});
  };
  if (contributes(to, have)) {
    reply(History{});
    return;
  }
  Step limit = std::numeric_limits<Step>::max();
  if (kind_ == ChannelKind::collective) {
    limit = have + 1;
  } else if (rounds_.is_over(round)) {
    limit = rounds_.end_of(round);
    if (have >= limit) {
      reply(Over{0, round, {}});
      rank.round = round + 1;
      return;
    }
  } else if (rounds_.followed() && rounds_.align_every() > 0) {
    limit = (have / rounds_.align_every() + 1) * rounds_.align_every();
  }
  if (script_ && kind_ == ChannelKind::training) {
    const Step next = script_->next_step_of(to, have).value_or(limit);
    if (next == have && !rank.away) {
      begin();
      return;
    }
    limit = std::min(limit, next);
  }
  const Step upto = std::min({final_, limit, have + updates_per_page});
  if (have < upto) {
    History history;
    for (Step step = have; step < upto; ++step) {
      history.updates.push_back(history_[static_cast<std::size_t>(step - history_first_)]);
    }
    Record caught_up = record(Record::Event::caught_up, now);
    caught_up.ranks = {to};
    caught_up.step = have;
    caught_up.reason = std::to_string(upto - have) + " updates";
    out_.records.push_back(caught_up);
    reply(std::move(history));
    return;
  }
  if (have < open_step_ && lacks(have, to)) {
    begin();
    return;
  }
  if (have < open_step_ || rank.away || rank.joined || kind_ == ChannelKind::collective)
    return;                                      // until something is final, or over
  if (script_ && have < script_->end()) return;  // by the trace, it does not compute this step
  int could = 0;
  for (int r = 0; r < size_; ++r) could += able(r) ? 1 : 0;
  ResumeView view;
  view.now = now;
  view.opened = opened_at_;
  view.typical_us = typical_us_;
  view.needed = rank.turned_away || could <= required() || held(now).has_value() ||
                (options_.max_misses > 0 && rank.misses >= options_.max_misses);
  const Verdict verdict = rank.misses == 0 ? Verdict{true, {}, "it was not late"} : resume_now(view);
  if (verdict.yes) {
    if (rank.misses > 0) {
      rank.handicap_us = now - opened_at_;
      rank.resumed_at = now;
      Record resumed = record(Record::Event::resumed, now);
      resumed.ranks = {to};
      resumed.step = have;
      out_.records.push_back(resumed);
    }
    rank.turned_away = false;
    begin();
  } else if (verdict.look_again) {
    look_again(*verdict.look_again);
  }
}

void ChannelBook::late(int to, const Arrive& message, TimeUs arrived_at, TimeUs now, const std::string& reason) {
  put_drop_on_record(to, message, arrived_at, now, reason);
  tell_late(to, message.step, message.scope);
}

void ChannelBook::tell_late(int to, Step step, int scope) {
  out_.replies.push_back({to, Late{id_, step, scope, open_step_, outlook_for(to)}});
}

void ChannelBook::put_drop_on_record(int rank, const Arrive& message, TimeUs arrived_at, TimeUs now,
                                     const std::string& reason) {
  Record dropped = record(Record::Event::dropped, now);
  dropped.step = message.step;
  dropped.scope = message.scope;
  dropped.ranks = {rank};
  dropped.bases = {message.base};
  dropped.arrivals = {arrived_at};
  dropped.reason = reason;
  out_.records.push_back(dropped);
}

void ChannelBook::dismiss_arrivals(TimeUs now, const std::string& reason) {
  for (auto slot = slots_.lower_bound({open_step_, 0}); slot != slots_.end();) {
    for (const Arrival& arrival : slot->second.arrivals) late(arrival.rank, arrival.message, arrival.at, now, reason);
    for (const Arrival& arrival : slot->second.latecomers) {
      put_drop_on_record(arrival.rank, arrival.message, arrival.at, now, reason);
    }
    slot = slots_.erase(slot);
  }
}

void ChannelBook::fail(const std::string& reason, TimeUs now) {
  failure_ = reason;
  Record failed = record(Record::Event::failed, now);
  failed.reason = reason;
  out_.records.push_back(failed);
  for (int r = 0; r < size_; ++r) {
    RankState& rank = ranks_[static_cast<std::size_t>(r)];
    rank.waiting.reset();
    if (rank.opened && !gone_[static_cast<std::size_t>(r)]) out_.replies.push_back({r, Failed{name_, reason}});
  }
}

void ChannelBook::look_again(TimeUs at) { deadline_ = deadline_ ? std::min(*deadline_, at) : at; }

Record ChannelBook::record(Record::Event event, TimeUs now) const {
  Record record;
  record.at = now;
  record.event = event;
  record.channel = name_;
  return record;
}

}  // namespace hvd_backup
