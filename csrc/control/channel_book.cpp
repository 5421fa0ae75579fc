#include "control/channel_book.h"

#include <algorithm>
#include <limits>

namespace hvd_backup {

namespace {

constexpr Step updates_per_page = 16;  // of one History: a late rank asks again after it has applied them

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

void ChannelBook::tick(TimeUs now) { settle(now); }

bool ChannelBook::able(int rank) const {
  const RankState& state = ranks_[static_cast<std::size_t>(rank)];
  if (gone_[static_cast<std::size_t>(rank)] || state.away || state.joined) return false;
  return strict() || !state.paused;
}

// Can still contribute to this decision.
bool ChannelBook::able(int rank, const Slot& slot) const {
  return able(rank) && std::find(slot.nonfinite.begin(), slot.nonfinite.end(), rank) == slot.nonfinite.end();
}

bool ChannelBook::able_in_open_step(int rank) const {
  return able(rank) && std::all_of(slots_.lower_bound({open_step_, 0}), slots_.lower_bound({open_step_ + 1, 0}),
                                   [&](const auto& entry) { return able(rank, entry.second); });
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

// The updates before are wanted by nobody any more: all have them, or take over the state of another rank.
Step ChannelBook::all_wanted() const { return std::max(all_have(), kept_from_); }

Outlook ChannelBook::outlook_for(int rank) const {
  const int round = ranks_[static_cast<std::size_t>(rank)].round;
  const Step end = rounds_.is_over(round) ? rounds_.end_of(round) : rounds_.planned_end(gone_).value_or(-1);
  return {end, all_wanted(), resyncs() && anybody_beyond()};
}

// Ranks with align_every meet at its multiples, and begin the round together: one that began later would reach the
// first meeting before it has entered its loop.
bool ChannelBook::is_meeting(Step step) const {
  const std::int64_t every = rounds_.align_every();
  return rounds_.followed() && every > 0 && (step == rounds_.start() || step % every == 0);
}

// All ranks are to meet at the open step, and not all are there.
bool ChannelBook::meeting_pending() const {
  if (resyncs() && open_step_ == rounds_.start() && rounds_.ended_in_meeting() && all_have() < open_step_) return true;
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
  if (resyncs()) return held_for_returning(now);
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
    finish_steps(now);
    look_after_states(now);
  }
  for (int r = 0; r < size_; ++r) answer(r, now);
  if (failure_.empty()) watch_stall(now);
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
  if (!(anybody_waits() || is_in_vain_for_all()) || held(now)) return false;
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
    view.nonfinite = static_cast<int>(slot.nonfinite.size());
    for (int r = 0; r < size_; ++r) {
      if (arrived[static_cast<std::size_t>(r)]) continue;
      const RankState& missing = ranks_[static_cast<std::size_t>(r)];
      if (strict() && gone_[static_cast<std::size_t>(r)] && !missing.lost && !slot.arrivals.empty()) {
        const std::string& why = missing.failure;
        fail("rank " + std::to_string(r) + " has left" + (why.empty() ? "" : " (" + why + ")") + ", and '" + name_ +
                 "' needs all ranks",
             now);
        return false;
      }
      if (!able(r, slot)) continue;
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

// By the trace nobody contributes to the open step, and a rank has come to it.
bool ChannelBook::is_in_vain_for_all() const {
  const ScriptedDecision* scripted = script_ ? script_->find(open_step_, 0) : nullptr;
  return scripted && scripted->contributors.empty() &&
         std::any_of(ranks_.begin(), ranks_.end(),
                     [this](const RankState& rank) { return rank.arrived >= open_step_; });
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
      if (complete || able(r) || holds(slot.arrivals, r)) continue;
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
  move_journal(now);
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
  for (const int rank : slot.nonfinite) tell_late(rank, open_step_, scope);
  const Ranks& contributors = slot.decision->contributors;
  if (strict()) out_.met.insert(out_.met.end(), contributors.begin(), contributors.end());
}

void ChannelBook::advance_open_step(TimeUs now) {
  std::vector<int> in(static_cast<std::size_t>(size_), 0);
  bool is_empty = true;  // then nobody is behind anybody
  for (int scope = 0; scope < scopes_; ++scope) {
    const Slot& slot = slots_[{open_step_, scope}];
    for (int r : slot.decision->contributors) ++in[static_cast<std::size_t>(r)];
    for (int r : slot.nonfinite) ranks_[static_cast<std::size_t>(r)].on_time = true;
    is_empty = is_empty && slot.decision->contributors.empty();
  }
  for (int r = 0; r < size_; ++r) {
    RankState& rank = ranks_[static_cast<std::size_t>(r)];
    rank.handicap_us.reset();
    if (in[static_cast<std::size_t>(r)] == scopes_) {
      rank.misses = 0;
      rank.on_time = true;
    } else if (able(r) && !is_empty) {
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
    for (int r = 0; r < size_; ++r) {
      const bool in_all = std::all_of(update.contributors.begin(), update.contributors.end(), [r](const Ranks& ranks) {
        return std::binary_search(ranks.begin(), ranks.end(), r);
      });
      if (in_all) ranks_[static_cast<std::size_t>(r)].contributed_to = final_;
    }
    for (const auto& [rank, at] : done) {
      finished.ranks.push_back(rank);
      finished.arrivals.push_back(at);
    }
    out_.records.push_back(finished);
    if (chooser_) chooser_->measured(finished.squares, slots_[{final_, 0}].decision->weights);
    for (int scope = 0; scope < scopes_; ++scope) {
      const Ranks& whole_keepers = slots_[{final_, scope}].attempt.whole_keepers();
      if (!whole_keepers.empty()) whole_keepers_[{final_, scope}] = whole_keepers;
      slots_.erase({final_, scope});
    }
    history_.push_back(std::move(update));
    ++final_;
    if (final_ == open_step_) opened_at_ = now;
    const Step least = all_wanted();
    while (!history_.empty() && history_first_ < least) {
      history_.pop_front();
      ++history_first_;
    }
    whole_keepers_.erase(whole_keepers_.begin(), whole_keepers_.lower_bound({history_first_, 0}));
  }
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
      ask_early(to, now);
      reply(Over{0, round, limit, {}});
      rank.round = round + 1;
      return;
    }
  } else if (rounds_.followed() && rounds_.align_every() > 0) {
    limit = (have / rounds_.align_every() + 1) * rounds_.align_every();
  }
  if (needs_state(to)) {
    if (auto resync = state_for(to, have, now)) reply(*resync);
    return;
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
    if (have < history_first_) {
      throw RuntimeFailure("malformed message: rank " + std::to_string(to) + " asks for update " +
                           std::to_string(have) + ", but has said since that it has it");
    }
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
  for (int r = 0; r < size_; ++r) could += able_in_open_step(r) ? 1 : 0;
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
    if (!slot->second.decision) {
      for (const int rank : slot->second.nonfinite) tell_late(rank, slot->first.first, slot->first.second);
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
