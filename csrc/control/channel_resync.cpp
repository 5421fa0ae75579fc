// The part of a ChannelBook that looks after ranks beyond the journal (design, rule 6, on_max_lag="resync"): the others
// go on, and such a rank takes over the state of one that is between two updates. It is pulled, like everything that
// late ranks get; a rank is only asked to make a copy, at a moment that suits it. Nobody is asked before somebody needs
// a copy, except those who are about to go where they cannot make one: to the end of a round, or where all ranks meet.
#include "control/channel_book.h"

#include <algorithm>

namespace hvd_backup {

namespace {

constexpr int most_asked_early = 2;  // one of them may stop

}  // namespace

bool ChannelBook::resyncs() const {
  return options_.resync && kind_ == ChannelKind::training && options_.required < size_;
}

// So many updates the rank has, without fetching any: at least.
Step ChannelBook::has(int rank) const {
  const RankState& state = ranks_[static_cast<std::size_t>(rank)];
  return scopes_ == 1 ? std::max(state.applied, state.reached) : state.applied;  // reached: in one scope, maybe
}

bool ChannelBook::is_beyond(int rank) const { return !gone_[static_cast<std::size_t>(rank)] && has(rank) < kept_from_; }

bool ChannelBook::anybody_beyond() const {
  for (int r = 0; r < size_; ++r) {
    if (is_beyond(r)) return true;
  }
  return false;
}

// The open step is about to be decided: what the journals cannot hold besides falls out of them. Which rank then is
// beyond them is said once until it has come back: half the journal is between the two, for one at the edge.
void ChannelBook::move_journal(TimeUs now) {
  const Step from = open_step_ + 1 - options_.max_lag;  // at most: see held_for_returning
  if (!resyncs() || from <= kept_from_) return;
  for (int r = 0; r < size_; ++r) {
    bool& said = ranks_[static_cast<std::size_t>(r)].said_beyond;
    if (open_step_ - has(r) <= options_.max_lag / 2) said = false;
    if (gone_[static_cast<std::size_t>(r)] || said || has(r) >= from) continue;
    said = true;
    Record beyond = record(Record::Event::beyond, now);
    beyond.step = open_step_;
    beyond.ranks = {r};
    beyond.reason = "rank " + std::to_string(r) + " is " + std::to_string(open_step_ - has(r)) +
                    " updates behind, at step " + std::to_string(has(r)) +
                    ", and the journal holds max_lag=" + std::to_string(options_.max_lag) +
                    ": the others go on, and it takes over the state of one of them when it comes back "
                    "(on_max_lag=\"resync\")";
    out_.records.push_back(beyond);
  }
  kept_from_ = from;
}

// It waits for what the journals do not give it.
bool ChannelBook::needs_state(int rank) const {
  const std::optional<Sync>& waiting = ranks_[static_cast<std::size_t>(rank)].waiting;
  if (!waiting || !resyncs() || waiting->have >= final_) return false;
  return waiting->have < std::max(kept_from_, history_first_) || waiting->lost;  // equal, as far as ranks do not lie
}

// The first step whose state is of use to the rank.
Step ChannelBook::needed_from(int rank) const {
  const std::optional<Sync>& waiting = ranks_[static_cast<std::size_t>(rank)].waiting;
  return std::max(kept_from_, waiting ? waiting->have + 1 : 0);
}

std::optional<Resync> ChannelBook::state_for(int rank, Step have, TimeUs now) {
  const StateOffer* found = offers_.find(rank, std::max(kept_from_, have + 1));
  if (found == nullptr) return std::nullopt;
  Resync resync;
  resync.channel = id_;
  resync.server = found->server;
  resync.step = found->step;
  resync.bytes = found->bytes;
  resync.contributed = ranks_[static_cast<std::size_t>(rank)].contributed_to == have;
  RankState& taker = ranks_[static_cast<std::size_t>(rank)];
  if (taker.taken_over == have && !returning_) returning_ = {rank, found->step, now + 2 * taker.taking_us};
  taker.given_at = now;
  offers_.give(rank, have, *found);
  return resync;
}

// If a state takes so long to be taken over that the others make max_lag updates meanwhile, a rank would never come
// back. So the second time in a row they wait for it, as long as the first time leads to expect: never for a rank that
// has stopped again.
std::optional<std::string> ChannelBook::held_for_returning(TimeUs now) {
  if (!returning_) return std::nullopt;
  const int rank = returning_->rank;
  const Step applied = ranks_[static_cast<std::size_t>(rank)].applied;
  const Step has = std::max(returning_->from, applied);
  if (gone_[static_cast<std::size_t>(rank)] || now >= returning_->until || applied >= open_step_) {
    returning_.reset();
    held_reason_.clear();
    return std::nullopt;
  }
  look_again(returning_->until);
  if (open_step_ + 1 - has <= options_.max_lag) return std::nullopt;
  Record held = record(Record::Event::held, now);
  held.ranks = {rank};
  held.step = open_step_;
  held.reason = "rank " + std::to_string(rank) + " takes over the state of another one for the second time: it was " +
                "beyond the journal again, of max_lag=" + std::to_string(options_.max_lag) +
                " updates, when it had. The others wait for it now, for " +
                std::to_string((returning_->until - now + 999) / 1000) + " ms at most: give a larger max_lag";
  if (held_reason_.empty()) out_.records.push_back(held);
  held_reason_ = held.reason;
  return held.reason;
}

void ChannelBook::look_after_states(TimeUs now) {
  if (!resyncs()) return;
  bool wanted = anybody_beyond();
  for (int r = 0; r < size_; ++r) wanted = wanted || needs_state(r);
  for (const StateOffer& unneeded : offers_.take_unneeded(kept_from_, wanted)) {
    out_.replies.push_back({unneeded.server, Dismiss{id_, unneeded.step}});
  }
  for (int r = 0; r < size_; ++r) {
    if (gone_[static_cast<std::size_t>(r)]) continue;
    if (offers_.wants_another(r)) {
      if (auto another = state_for(r, offers_.had_by(r), now)) {
        another->instead = true;
        another->outlook = outlook_for(r);
        out_.replies.push_back({r, *another});
      } else {
        ask_for(r, now);
      }
    } else if (needs_state(r) && offers_.find(r, needed_from(r)) == nullptr) {
      ask_for(r, now);
    }
  }
}

// Asks one rank after the other for a copy of its state: the next one when the last does not answer, for it may have
// stopped.
void ChannelBook::ask_for(int taker, TimeUs now) {
  const TimeUs patience = copy_time_.patience_us();
  bool anybody = false;
  TimeUs last = 0;
  for (const auto& [server, since] : offers_.asked()) {
    if (server == taker || gone_[static_cast<std::size_t>(server)]) continue;
    anybody = true;
    last = std::max(last, since);
  }
  if (anybody && now < last + patience) {
    look_again(last + patience);
    return;
  }
  if (const auto server = next_server(taker)) {
    ask(*server, now);
    look_again(now + patience);
  } else if (!anybody && !offers_.is_taking(taker)) {
    fail("rank " + std::to_string(taker) + " is at step " + std::to_string(has(taker)) +
             ", beyond the journal, and no rank is left whose state it could take over: begin anew from a checkpoint",
         now);
  }
}

void ChannelBook::ask(int server, TimeUs now) {
  if (const auto oldest = offers_.take_oldest(server)) {  // who is taking it gets another one
    out_.replies.push_back({server, Dismiss{id_, oldest->step}});
  }
  offers_.asked(server, now);
  out_.replies.push_back({server, Offer{id_}});
}

Ranks ChannelBook::starving() const {
  Ranks starving;
  for (int r = 0; failure_.empty() && r < size_; ++r) {
    if (needs_state(r) && offers_.find(r, needed_from(r)) == nullptr && !offers_.is_taking(r)) starving.push_back(r);
  }
  return starving;
}

Ranks ChannelBook::servers_of(int taker) const {
  Ranks servers;
  for (int r = 0; r < size_; ++r) {
    const bool serves = ranks_[static_cast<std::size_t>(r)].opened && !gone_[static_cast<std::size_t>(r)];
    if (serves && r != taker && has(r) >= needed_from(taker)) servers.push_back(r);
  }
  return servers;
}

// Best one that has not let the taker down, and contributes to the newest update, so it goes on anyway; of those the
// last, so that rank 0 is spared.
std::optional<int> ChannelBook::next_server(int taker) const {
  std::optional<int> best;
  int best_points = 0;
  for (const int r : servers_of(taker)) {
    if (offers_.is_asked(r)) continue;
    const bool contributes = ranks_[static_cast<std::size_t>(r)].contributed_to + 1 == final_;
    const int points = 2 * (offers_.has_given(r, taker) ? 0 : 1) + (contributes ? 1 : 0);
    if (best && points < best_points) continue;
    best = r;
    best_points = points;
  }
  return best;
}

// The rank is about to go where it makes no copies, for how long is not known; those beyond may be waited for there.
void ChannelBook::ask_early(int rank, TimeUs now) {
  if (!resyncs() || !anybody_beyond() || offers_.find(-1, kept_from_) != nullptr) return;
  int asked = 0;
  for (const auto& [server, since] : offers_.asked()) asked += gone_[static_cast<std::size_t>(server)] ? 0 : 1;
  if (asked < most_asked_early && !offers_.is_asked(rank) && !is_beyond(rank)) ask(rank, now);
}

void ChannelBook::offered(int from, const Offered& message, TimeUs now) {
  const TimeUs took = offers_.offered(from, message.step, message.bytes, now);
  if (took >= 0) copy_time_.measured(took);
  settle(now);
}

void ChannelBook::state_lost(int from, const StateLost& message, TimeUs now) {
  offers_.lost(from, message.server, message.step);
  settle(now);
}

// The rank goes on with `have` updates: if that is a state that it was given, this is put on record.
void ChannelBook::note_taken(int rank, Step have, TimeUs now) {
  RankState& taker = ranks_[static_cast<std::size_t>(rank)];
  const Step had = taker.applied;
  const int server = offers_.taken(rank, have);
  if (server < 0) return;
  taker.taken_over = have;
  taker.taking_us = now - taker.given_at;
  Record resynced = record(Record::Event::resynced, now);
  resynced.step = have;
  resynced.ranks = {rank, server};
  resynced.reason = "rank " + std::to_string(rank) + " has taken over the state of rank " + std::to_string(server) +
                    " at step " + std::to_string(have) + ", in place of " + std::to_string(have - had) + " updates";
  out_.records.push_back(resynced);
}

}  // namespace hvd_backup
