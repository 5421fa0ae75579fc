#include "control/member.h"

#include <algorithm>

namespace hvd_backup {

void Member::set_layout(const std::vector<int>& scope_of_bucket) {
  if (!scope_of_bucket_.empty()) throw UsageError("set_layout() was called before: a channel's layout does not change");
  if (scope_of_bucket.empty()) throw UsageError("set_layout(): at least one bucket is needed");
  const int scopes = *std::max_element(scope_of_bucket.begin(), scope_of_bucket.end()) + 1;
  buckets_in_scope_.assign(static_cast<std::size_t>(scopes), 0);
  for (int s : scope_of_bucket) {
    if (s < 0) throw UsageError("set_layout(): scopes are numbered from 0");
    ++buckets_in_scope_[static_cast<std::size_t>(s)];
  }
  if (std::count(buckets_in_scope_.begin(), buckets_in_scope_.end(), 0) > 0) {
    throw UsageError("set_layout(): every scope needs a bucket");
  }
  scope_of_bucket_ = scope_of_bucket;
}

void Member::begin(double samples, std::string metadata) {
  if (scope_of_bucket_.empty()) throw UsageError("begin() before set_layout()");
  if (begun_)
    throw UsageError("begin() for step " + std::to_string(applied_) + " was called before: call wait() first");
  if (ready_) throw UsageError("begin() while an update is ready: take it with wait() first");
  if (!(samples > 0)) throw UsageError("samples must be above 0, given " + std::to_string(samples));
  begun_ = true;
  waiting_announced_ = false;
  samples_ = samples;
  metadata_ = std::move(metadata);
  submitted_.assign(scope_of_bucket_.size(), false);
  scopes_.assign(buckets_in_scope_.size(), {});
  for (std::size_t s = 0; s < scopes_.size(); ++s) scopes_[s].missing = buckets_in_scope_[s];
}

void Member::submit(int bucket, bool finite) {
  if (!begun_) throw UsageError("submit() before begin()");
  if (bucket < 0 || static_cast<std::size_t>(bucket) >= submitted_.size()) {
    throw UsageError("submit(): there is no bucket " + std::to_string(bucket) + ", the layout has " +
                     std::to_string(submitted_.size()));
  }
  if (submitted_[static_cast<std::size_t>(bucket)]) {
    throw UsageError("bucket " + std::to_string(bucket) + " was submitted before in step " + std::to_string(applied_));
  }
  submitted_[static_cast<std::size_t>(bucket)] = true;
  if (over_) return;  // dropped: next() says so
  const int index = scope_of_bucket_[static_cast<std::size_t>(bucket)];
  Scope& own = scope(index);
  --own.missing;
  own.finite = own.finite && finite;
  if (own.phase == Phase::idle && (arrive_first_ || own.missing == 0)) arrive(index);
}

void Member::arrive(int scope_index) {
  scope(scope_index).phase = Phase::arrived;
  Arrive message;
  message.channel = id_;
  message.step = applied_;
  message.scope = scope_index;
  message.base = applied_;
  message.round = round_;
  message.scopes = static_cast<std::int32_t>(scopes_.size());
  message.buckets = static_cast<std::int32_t>(scope_of_bucket_.size());
  message.samples = samples_;
  message.finite = scope(scope_index).finite;
  if (scope_index == 0) message.metadata = metadata_;
  messages_.push_back(std::move(message));
}

void Member::check_complete() const {
  const auto missing = std::find(submitted_.begin(), submitted_.end(), false);
  if (missing == submitted_.end()) return;
  throw UsageError("wait() in step " + std::to_string(applied_) + ": bucket " +
                   std::to_string(missing - submitted_.begin()) + " was not submitted");
}

bool Member::next() {
  if (ready_) return true;
  if (begun_) {
    check_complete();
    if (over_) {
      ready_ = Update{Update::Kind::over, applied_, {}, false, 0, {}, 0};
      return true;
    }
    bool late = false;
    for (const Scope& own : scopes_) {
      if (own.phase == Phase::arrived || own.phase == Phase::contributing || own.phase == Phase::voted) return false;
      late = late || own.phase == Phase::late;
    }
    if (!late) {
      ready_ = own_update();
      return true;
    }
  }
  if (fetching_ || resyncing_) return false;
  if (!pages_.empty()) return fetch_next_page_entry();
  if (!sync_sent_) {
    sync_sent_ = true;
    messages_.push_back(Sync{id_, applied_, round_, std::exchange(lost_, false)});
  }
  return false;
}

bool Member::decided() const {
  return begun_ && std::all_of(scopes_.begin(), scopes_.end(), [](const Scope& own) {
           return own.phase == Phase::done || (own.phase == Phase::contributing && !own.decision.votes);
         });
}

Update Member::own_update() const {
  Update update{Update::Kind::update, applied_, {}, true, 0, {}, 0};
  for (const Scope& own : scopes_) update.contributors.push_back(own.decision.contributors);
  update.samples = scopes_.front().decision.samples;
  update.metadata = scopes_.front().decision.metadata;
  update.required = scopes_.front().decision.required;
  return update;
}

bool Member::fetch_next_page_entry() {
  const PastUpdate& past = pages_.front();
  const bool empty =
      std::all_of(past.contributors.begin(), past.contributors.end(), [](const Ranks& r) { return r.empty(); });
  CatchUp missed{past, {}};
  for (std::size_t s = 0; s < past.contributors.size(); ++s) {
    const bool mine = begun_ && scopes_[s].phase == Phase::done;
    if (!mine && !past.contributors[s].empty()) missed.scopes.push_back(static_cast<int>(s));
  }
  if (empty) {  // all its contributors have withdrawn: it changes nothing, and nobody hears of it
    pages_.pop_front();
    counters_.dropped += begun_ ? 1 : 0;
    begun_ = false;
    ++applied_;
    return next();
  }
  fetching_ = past.step;
  if (missed.scopes.empty()) {  // what others contributed to the rest has been withdrawn
    fetched(past.step);
    return true;
  }
  catch_up_ = std::move(missed);
  return false;
}

void Member::fetched(Step step) {
  if (fetching_ != step) return;
  fetching_.reset();
  PastUpdate past = std::move(pages_.front());
  pages_.pop_front();
  ready_ = Update{Update::Kind::update,     past.step,    std::move(past.contributors), false, past.samples,
                  std::move(past.metadata), past.required};
}

Update Member::take() {
  Update update = std::move(*ready_);
  ready_.reset();
  const bool counts = begun_ && is_in(update);  // also of an update to which it had contributed before it stopped
  counters_.dropped += begun_ && !counts ? 1 : 0;
  counters_.contributed += counts ? 1 : 0;
  begun_ = false;
  if (update.kind == Update::Kind::update) {
    ++applied_;
    counters_.caught_up += update.contributed ? 0 : 1;
  } else if (update.kind == Update::Kind::resync) {
    counters_.resynced += update.step - applied_;
    applied_ = update.step;
  }
  return update;
}

bool Member::is_in(const Update& update) const {
  if (update.kind == Update::Kind::resync) return update.contributed;
  return update.kind == Update::Kind::update &&
         std::all_of(update.contributors.begin(), update.contributors.end(), [this](const Ranks& contributors) {
           return std::binary_search(contributors.begin(), contributors.end(), rank_);
         });
}

std::optional<Step> Member::round_end() const {
  if (outlook_.round_end < 0) return std::nullopt;
  return outlook_.round_end;
}

void Member::begin_round(std::int64_t length, std::int64_t align_every) {
  if (begun_) throw UsageError("a round can't begin between backward() and step()");
  over_ = false;
  leaving_ = false;
  outlook_.round_end = -1;
  messages_.push_back(BeginRound{id_, round_, length, align_every});
}

void Member::away() {
  if (!over_) messages_.push_back(Away{id_, round_});
}

void Member::leave() {
  if (begun_) throw UsageError("a round can't be left between backward() and step()");
  if (over_) {  // it has ended already, and this rank has all of it
    over_ = false;
    ready_ = Update{Update::Kind::over, applied_, {}, false, 0, {}, 0};
    return;
  }
  leaving_ = true;
  messages_.push_back(Leave{id_, round_});
}

void Member::announce_waiting() {
  const bool needs_others = std::any_of(scopes_.begin(), scopes_.end(), [](const Scope& own) {
    return own.phase == Phase::arrived || own.phase == Phase::contributing || own.phase == Phase::voted;
  });
  if (!begun_ || waiting_announced_ || !needs_others) return;
  waiting_announced_ = true;
  messages_.push_back(Waiting{id_, applied_});
}

void Member::withdraw(bool also_complete) {
  if (!begun_) return;
  for (std::size_t s = 0; s < scopes_.size(); ++s) {
    Scope& own = scopes_[s];
    // Late: it might stand in for another rank.
    const bool incomplete = own.missing > 0 && own.phase != Phase::idle && own.phase != Phase::done;
    const bool undecided = own.phase == Phase::arrived || own.phase == Phase::late;
    if (own.withdrawn || (!incomplete && !(also_complete && undecided))) continue;
    own.phase = Phase::late;
    own.withdrawn = true;
    messages_.push_back(Withdraw{id_, applied_, static_cast<std::int32_t>(s)});
  }
}

bool Member::contributing_to_any() const {
  return std::any_of(scopes_.begin(), scopes_.end(),
                     [](const Scope& own) { return own.phase == Phase::contributing || own.phase == Phase::voted; });
}

bool Member::contributing(Step step, int scope_index, int attempt) const {
  if (!begun_ || step != applied_) return false;
  const Scope& own = scopes_[static_cast<std::size_t>(scope_index)];
  return own.phase == Phase::contributing && own.decision.attempt == attempt;
}

void Member::receive(const Decision& message) {
  outlook_ = message.outlook;
  if (!begun_ || message.step != applied_) return;
  Scope& own = scope(message.scope);
  const bool takes_part = own.phase == Phase::contributing || own.phase == Phase::voted;
  const bool next_attempt = takes_part && message.attempt > own.decision.attempt;
  // A late rank may stand in for a contributor that has stopped, as long as it can't go on without this update.
  const bool stands_in = own.phase == Phase::late && !own.withdrawn;
  if (own.phase != Phase::arrived && !next_attempt && !stands_in) return;
  own.phase = Phase::contributing;
  own.decision = message;
  reductions_.push_back(message);
}

void Member::receive(const Final& message) {
  outlook_ = message.outlook;
  if (!begun_ || message.step != applied_) return;
  Scope& own = scope(message.scope);
  if (own.phase == Phase::voted && own.decision.attempt == message.attempt) finish(own);
}

void Member::receive(const Late& message) {
  outlook_ = message.outlook;
  if (!begun_ || message.step != applied_) return;
  Scope& own = scope(message.scope);
  if (own.phase != Phase::idle && own.phase != Phase::done) own.phase = Phase::late;
}

void Member::receive(const History& message) {
  outlook_ = message.outlook;
  sync_sent_ = false;
  for (const PastUpdate& update : message.updates) {
    if (update.contributors.size() != buckets_in_scope_.size()) {
      throw RuntimeFailure("malformed message: update " + std::to_string(update.step) + " has " +
                           std::to_string(update.contributors.size()) + " scopes");
    }
    if (update.step >= applied_) pages_.push_back(update);
  }
}

void Member::receive(const Resume& message) {
  outlook_ = message.outlook;
  sync_sent_ = false;
  ready_ = Update{Update::Kind::resume, applied_, {}, false, 0, {}, 0};
}

void Member::receive(const Over& message) {
  outlook_ = message.outlook;
  sync_sent_ = false;
  over_ = !leaving_;
  leaving_ = false;
  round_ = message.round + 1;
  round_start_ = message.end;
  ready_ = Update{Update::Kind::over, applied_, {}, false, 0, {}, 0};
}

void Member::receive(const Offer&) { state_wanted_ = true; }

void Member::offer(std::int64_t bytes) {
  state_wanted_ = false;
  messages_.push_back(Offered{id_, applied_, bytes});
}

void Member::receive(const Resync& message) {
  outlook_ = message.outlook;
  if (message.instead && !resyncing_) return;  // what it was to replace has come after all
  if (!message.instead) sync_sent_ = false;
  if (message.step <= applied_) return;
  resyncing_ = true;
  resyncs_.push_back(message);
}

bool Member::state_here(const Resync& state) {
  if (!resyncing_ || state.step <= applied_) return false;
  resyncing_ = false;
  ready_ = Update{Update::Kind::resync, state.step, {}, state.contributed, 0, {}, 0};
  return true;
}

void Member::state_lost(const Resync& state) {
  if (resyncing_) messages_.push_back(StateLost{id_, state.server, state.step});
}

void Member::fetch_lost(Step step) {
  if (fetching_ != step) return;
  fetching_.reset();
  pages_.clear();
  lost_ = true;
}

void Member::reduced(Step step, int scope_index, int attempt, const Squares& squares) {
  if (!contributing(step, scope_index, attempt)) return;
  Scope& own = scope(scope_index);
  messages_.push_back(Done{id_, step, scope_index, attempt, !holds_, squares});
  own.phase = Phase::voted;
  if (!own.decision.votes) finish(own);
}

void Member::finish(Scope& own) {
  own.phase = Phase::done;
  if (holds_) held_.push_back(own.decision);
}

std::vector<Decision> Member::commit() {
  for (const Decision& held : held_) messages_.push_back(Kept{id_, held.step, held.scope});
  return std::exchange(held_, {});
}

int Member::unsubmitted(int scope_index) const {
  return begun_ ? scopes_[static_cast<std::size_t>(scope_index)].missing : 0;
}

}  // namespace hvd_backup
