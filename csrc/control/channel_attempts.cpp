// The part of a ChannelBook that looks after decisions until their updates are final: attempts, who is replaced by
// whom, and when late ranks can fetch (design, rule 4).
#include "control/channel_book.h"

#include <algorithm>
#include <numeric>

namespace hvd_backup {

namespace {
// A group, of whose members all say that they wait for each other, has failed without a word. To connect the first time
// takes seconds.
constexpr TimeUs group_patience_us = 10'000'000;
}  // namespace

// Of the slot's arrivals.
void ChannelBook::begin_attempt(Slot& slot, const std::string& reason, TimeUs now) {
  std::sort(slot.arrivals.begin(), slot.arrivals.end(),
            [](const Arrival& a, const Arrival& b) { return a.rank < b.rank; });
  Decision& decision = *slot.decision;
  decision.tag = tags_(2 * buckets_);
  set_contributors(decision, slot.arrivals);
  if (!decision.result.empty()) decision.votes = false;  // all have the result, or none
  // What is begun anew goes through host memory: what was in the way may still be there.
  const bool may_be_served = decision.votes && decision.attempt == 0 && on_device_;
  decision.group = may_be_served ? out_.groups.serving(decision.contributors) : 0;
  const TimeUs patience = transfer_time_.patience_us() << std::min(decision.attempt, 6);
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
    if (is_meeting(decision.step + 1)) ask_early(contributor, now);
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
    if (is_in_work(slot) || slot.broken) changed = watch(slot, now) || changed;
  }
  return changed;
}

// Ends the attempt, if it is complete or can go on without whom it waits for. Returns whether anything has changed.
bool ChannelBook::watch(Slot& slot, TimeUs now) {
  const Decision& decision = *slot.decision;
  if (slot.broken) return begin_next_attempt(slot, {}, now);
  if (slot.attempt.complete()) {
    if (decision.attempt == 0 && !decision.contributors.empty()) {
      transfer_time_.measured(now - slot.attempt.began());
    }
    make_final(slot, {}, now);
    return true;
  }
  for (const int rank : slot.attempt.ask(now)) {
    out_.replies.push_back({rank, Probe{id_, decision.step, decision.scope, decision.attempt}});
  }
  const Suspicion suspicion = slot.attempt.suspicion(now);
  if (suspicion.look_again) look_again(*suspicion.look_again);
  if (suspicion.ranks.empty()) {
    if (decision.group == 0) return false;
    if (now - slot.attempt.began() >= group_patience_us) out_.groups.hangs(decision.group, now);
    look_again(std::max(now, slot.attempt.began() + group_patience_us));
    return false;
  }
  const int holders = std::min(2, decision.required);  // so that the update survives one more
  if (!slot.attempt.complete_without(suspicion.ranks, holders)) {
    return begin_next_attempt(slot, suspicion, now);
  }
  put_given_up_on_record(Record::Event::stopped, slot, suspicion.ranks,
                         suspicion.reason + "; the others have the whole update", now);
  make_final(slot, suspicion.ranks, now);
  return true;
}

// Among the contributors without the suspects, and those who have arrived since: they can't go on without this very
// update, so their gradients are still there. With fewer than N nothing changes as long as others can come; but whoever
// has withdrawn has left, and is not waited for.
bool ChannelBook::begin_next_attempt(Slot& slot, const Suspicion& suspicion, TimeUs now) {
  const Ranks& suspects = suspicion.ranks;
  const std::string& reason = suspicion.reason;
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
  const auto end = rounds_.planned_end(gone_);  // earlier than before, if who had the most steps has left
  const bool comes_nobody = end && decision.step >= *end;
  int others = 0;
  for (int r = 0; r < size_ && !comes_nobody; ++r) {
    // A rank has left, which would have ended the round before this step, had it not begun.
    const bool is_suspect =
        suspicion.stopped && rounds_.ends_early() && std::binary_search(suspects.begin(), suspects.end(), r);
    others += !is_in[static_cast<std::size_t>(r)] && !is_suspect && able(r, slot) ? 1 : 0;
  }
  const int count = static_cast<int>(arrivals.size());
  // The last who could make it have died, or what is left is not finite: then it is empty.
  const bool all_died = std::all_of(given_up.begin(), given_up.end(), [this](const Arrival& arrival) {
    return ranks_[static_cast<std::size_t>(arrival.rank)].lost;
  });
  const bool nobody_is_left = count + others == 0 && (all_died || !slot.nonfinite.empty());
  const bool is_too_few = !slot.broken && !nobody_is_left && count < needed_arrivals(decision.required, count, others);
  slot.is_short = is_too_few || (count == 0 && somebody_will_call());
  if (slot.is_short) return false;
  if (!given_up.empty()) put_given_up_on_record(Record::Event::replaced, slot, suspects, reason, now);
  for (const Arrival& arrival : slot.latecomers) {
    if (is_in[static_cast<std::size_t>(arrival.rank)]) ranks_[static_cast<std::size_t>(arrival.rank)].misses = 0;
  }
  std::erase_if(slot.latecomers, [&](const Arrival& each) { return is_in[static_cast<std::size_t>(each.rank)]; });
  for (const Arrival& arrival : given_up) {
    if (ranks_[static_cast<std::size_t>(arrival.rank)].lost) continue;
    slot.latecomers.push_back(arrival);  // should it go on in time
    falls_behind(arrival.rank, decision);
  }
  slot.arrivals = std::move(arrivals);
  if (decision.group != 0) leave_group(decision.group, suspects, now);
  ++decision.attempt;
  begin_attempt(slot, reason.empty() ? "the next attempt" : "the next attempt: " + reason, now);
  for (const Arrival& arrival : slot.arrivals)
    answer(arrival.rank, now);  // who stands in does not wait for it any more
  return true;
}

// A collective has an outcome for whoever calls it: a rank that is in a full collective now will.
bool ChannelBook::somebody_will_call() const {
  if (kind_ != ChannelKind::collective) return false;
  for (int r = 0; r < size_; ++r) {
    if (!gone_[static_cast<std::size_t>(r)] && !ranks_[static_cast<std::size_t>(r)].joined) return true;
  }
  return false;
}

// event: replaced (in the next attempt) or stopped (this one is final without them).
void ChannelBook::put_given_up_on_record(Record::Event event, const Slot& slot, const Ranks& ranks,
                                         const std::string& reason, TimeUs now) {
  Record given_up = record(event, now);
  given_up.step = slot.decision->step;
  given_up.scope = slot.decision->scope;
  given_up.attempt = slot.decision->attempt + (event == Record::Event::replaced ? 1 : 0);
  given_up.ranks = ranks;
  given_up.reason = reason;
  out_.records.push_back(given_up);
}

// What the group was to do for these contributors, which the others go on without, does not end.
void ChannelBook::leave_group(GroupId group, const Ranks& stopped, TimeUs now) {
  out_.groups.broken(group, now);
  for (const int rank : stopped) out_.groups.stopped(rank, now);
}

void ChannelBook::disbanded(GroupId group, TimeUs now) {
  for (auto& [key, slot] : slots_) {
    if (is_in_work(slot) && slot.decision->group == group) slot.broken = true;
  }
  settle(now);
}

bool ChannelBook::is_served_by(GroupId group) const {
  return failure_.empty() && std::any_of(slots_.begin(), slots_.end(), [group](const auto& entry) {
           return is_in_work(entry.second) && entry.second.decision->group == group;
         });
}

// The others go on without this contributor, for which it counts as late.
void ChannelBook::falls_behind(int rank, const Decision& decision) {
  RankState& state = ranks_[static_cast<std::size_t>(rank)];
  state.misses = std::max(state.misses, 1);
  state.on_time = false;
  tell_late(rank, decision.step, decision.scope);
}

// stopped: contributors that do not have it. The update is what they have contributed to, but they fetch it like late
// ranks.
void ChannelBook::make_final(Slot& slot, const Ranks& stopped, TimeUs now) {
  const Decision& decision = *slot.decision;
  slot.is_final = true;
  if (!stopped.empty()) slot.attempt.keep_whole();
  if (!stopped.empty() && decision.group != 0) leave_group(decision.group, stopped, now);
  for (const int contributor : decision.contributors) {
    if (std::binary_search(stopped.begin(), stopped.end(), contributor)) {
      falls_behind(contributor, decision);
      continue;
    }
    RankState& rank = ranks_[static_cast<std::size_t>(contributor)];
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

// All its contributors have died, and nobody can have fetched it yet: it ends without them.
void ChannelBook::reopen_if_nobody_has_it(Slot& slot, TimeUs now) {
  const Ranks& contributors = slot.decision->contributors;
  const auto is_lost = [this](int rank) { return ranks_[static_cast<std::size_t>(rank)].lost; };
  if (contributors.empty() || !std::all_of(contributors.begin(), contributors.end(), is_lost)) return;
  if (slot.decision->votes && !slot.is_final) return;  // another attempt follows anyway
  put_given_up_on_record(Record::Event::replaced, slot, contributors, "whoever had it has died", now);
  slot.arrivals.clear();
  slot.is_final = false;
  slot.broken = true;
}

// An update of a scope that is decided for good: some rank still has to fetch it, but of one shard at least nobody who
// keeps it lives. whole_keepers: if there are any, they have all shards, and the other contributors have none.
bool ChannelBook::is_lost_to_somebody(Step step, const Ranks& contributors, const Ranks& whole_keepers) const {
  const auto is_lost = [this](int rank) { return ranks_[static_cast<std::size_t>(rank)].lost; };
  const bool by_shards = whole_keepers.empty();
  bool loses_shard = !by_shards && std::all_of(whole_keepers.begin(), whole_keepers.end(), is_lost);
  for (std::size_t i = 0; by_shards && i < contributors.size(); ++i) {  // as in engine/journal.h
    loses_shard = loses_shard || (is_lost(contributors[i]) && is_lost(contributors[(i + 1) % contributors.size()]));
  }
  if (!loses_shard) return false;
  for (int r = 0; r < size_; ++r) {
    const auto index = static_cast<std::size_t>(r);
    const bool has_it = by_shards && std::binary_search(contributors.begin(), contributors.end(), r);
    if (!gone_[index] && ranks_[index].applied <= step && !has_it) return true;
  }
  return false;
}

bool ChannelBook::somebody_has(Step step) const {
  for (int r = 0; r < size_; ++r) {
    if (!gone_[static_cast<std::size_t>(r)] && has(r) > step) return true;
  }
  return false;
}

// That has begun with this contributor, and cannot begin anew without it: some may not have all of its data yet.
std::optional<Step> ChannelBook::step_that_needs(int rank) const {
  for (const auto& [key, slot] : slots_) {
    if (!slot.decision || slot.decision->votes || !slot.decision->result.empty() || slot.attempt.complete()) continue;
    const Ranks& contributors = slot.decision->contributors;
    if (std::binary_search(contributors.begin(), contributors.end(), rank)) return key.first;
  }
  return std::nullopt;
}

std::optional<Step> ChannelBook::unrecoverable() const {
  for (const PastUpdate& update : history_) {
    if (resyncs() && somebody_has(update.step)) continue;  // whose state the others take over
    for (std::size_t scope = 0; scope < update.contributors.size(); ++scope) {
      const auto found = whole_keepers_.find({update.step, static_cast<int>(scope)});
      const Ranks keepers = found == whole_keepers_.end() ? Ranks{} : found->second;
      if (is_lost_to_somebody(update.step, update.contributors[scope], keepers)) return update.step;
    }
  }
  for (const auto& [key, slot] : slots_) {
    const bool is_settled = slot.decision && !slot.broken && (slot.is_final || !slot.decision->votes);
    if (is_settled && is_lost_to_somebody(key.first, slot.decision->contributors, slot.attempt.whole_keepers())) {
      return key.first;
    }
  }
  return std::nullopt;
}

// The rank takes part in an attempt at this step that is not final.
bool ChannelBook::contributes(int rank, Step step) const {
  return std::any_of(slots_.lower_bound({step, 0}), slots_.lower_bound({step + 1, 0}), [rank](const auto& entry) {
    const Slot& slot = entry.second;
    if (!is_in_work(slot)) return false;
    const Ranks& contributors = slot.decision->contributors;
    return std::binary_search(contributors.begin(), contributors.end(), rank);
  });
}

// An attempt at this step is given up, and this rank could contribute to the next one, if it computed the step.
bool ChannelBook::lacks(Step step, int rank) const {
  if (kind_ != ChannelKind::training || !able(rank)) return false;
  return std::any_of(slots_.lower_bound({step, 0}), slots_.lower_bound({step + 1, 0}), [&](const auto& entry) {
    const Slot& slot = entry.second;
    return slot.is_short && !slot.is_final && able(rank, slot) && !holds(slot.arrivals, rank) &&
           !holds(slot.latecomers, rank);
  });
}

}  // namespace hvd_backup
