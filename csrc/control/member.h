// One rank's side of one channel: which step it is at, what it has handed over, what it waits for. Pure, like the
// coordinator: calls of the training thread, messages, and the engine's "this is reduced" come in; messages and work
// go out.
//
// Life of a step:  begin -> submit each bucket -> next() until it returns true -> take() A contributor takes the
// update it helped to make. A late rank takes missed updates one after the other, until take() says `resume` (compute
// the newest step) or `over` (the round has ended).
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "control/messages.h"

namespace hvd_backup {

struct Update {
  // offer: the coordinator wants the state of this rank, which is to be given now (Member::offer), or never for what it
  // asks; nothing has changed. resync: the state of another rank has come: after it, `step` updates are applied.
  enum class Kind { update, resume, over, offer, resync };
  Kind kind = Kind::resume;
  Step step = 0;
  std::vector<Ranks> contributors;  // of each scope
  bool contributed = false;         // to every scope
  double samples = 0;
  std::string metadata;
  int required = 0;  // N, when it was decided
};

// A missed update to fetch: the scopes to which this rank did not contribute.
struct CatchUp {
  PastUpdate update;
  std::vector<int> scopes;
};

struct Counters {
  std::int64_t contributed = 0;
  std::int64_t dropped = 0;
  std::int64_t caught_up = 0;
  std::int64_t resynced = 0;  // updates, of which it has taken over the outcome
};

class Member {
 public:
  Member(int rank, ChannelKind kind, bool arrive_first) : rank_(rank), kind_(kind), arrive_first_(arrive_first) {}

  void opened(ChannelId id) { id_ = id; }
  void set_layout(const std::vector<int>& scope_of_bucket);

  // --- calls of the training thread; UsageError when out of order ---
  void begin(double samples, std::string metadata);
  // Not finite: the gradient of its scope is to count as late.
  void submit(int bucket, bool finite = true);
  bool next();    // drives towards the next update; true when take() has one
  Update take();  // acknowledges the one before
  void begin_round(std::int64_t length, std::int64_t align_every);
  void away();
  void leave();
  void announce_waiting();  // the training thread waits for a decision
  // From now on the training thread may change an update that it has taken before it applies it: what this rank has
  // reduced is kept for late ranks only when it calls commit().
  void hold() { holds_ = true; }
  bool holds() const { return holds_; }
  std::vector<Decision> commit();  // what was held
  // Takes back what has arrived and will never be complete; also what is complete and not decided, if so wanted.
  void withdraw(bool also_complete);
  bool contributing_to_any() const;
  // The coordinator has asked for this rank's state; or nobody has, but somebody will when this rank has left.
  bool state_wanted() const { return state_wanted_; }
  bool state_will_be_wanted() const { return outlook_.beyond; }
  void offer(std::int64_t bytes);  // a copy of it, after step() updates, is kept until dismissed
  Step round_start() const { return round_start_; }

  Step step() const { return applied_; }
  std::optional<Step> round_end() const;
  bool round_over() const { return over_; }
  const Counters& counters() const { return counters_; }
  Step all_have() const { return outlook_.all_have; }
  bool contributing(Step step, int scope, int attempt) const;
  int unsubmitted(int scope) const;  // buckets that were not handed over yet
  // Whatever happens, this rank contributes to the step that has begun, in every scope: others may have the update.
  bool decided() const;

  // --- messages of the coordinator ---
  void receive(const Decision& message);
  void receive(const Final& message);
  void receive(const Late& message);
  void receive(const History& message);
  void receive(const Resume& message);
  void receive(const Over& message);
  void receive(const Offer& message);
  void receive(const Resync& message);

  // --- the engine's reports ---
  void reduced(Step step, int scope, int attempt, const Squares& squares = {});
  void fetched(Step step);
  void fetch_lost(Step step);            // nobody keeps it
  bool state_here(const Resync& state);  // false: it is not needed any more
  void state_lost(const Resync& state);

  // --- what is to be done ---
  std::vector<Message> take_messages() { return std::exchange(messages_, {}); }
  std::vector<Decision> take_reductions() { return std::exchange(reductions_, {}); }
  std::optional<CatchUp> take_catch_up() { return std::exchange(catch_up_, std::nullopt); }
  std::vector<Resync> take_resyncs() { return std::exchange(resyncs_, {}); }  // states to be pulled

 private:
  // voted: it has the whole result, but that may not be the update yet.
  enum class Phase { idle, arrived, contributing, voted, done, late };
  struct Scope {
    Phase phase = Phase::idle;
    bool withdrawn = false;
    bool finite = true;
    int missing = 0;  // buckets not handed over yet
    Decision decision;
  };

  Scope& scope(int index) {
    if (index < 0 || static_cast<std::size_t>(index) >= scopes_.size()) {
      throw RuntimeFailure("malformed message: there is no scope " + std::to_string(index));
    }
    return scopes_[static_cast<std::size_t>(index)];
  }
  void arrive(int scope_index);
  void check_complete() const;
  bool fetch_next_page_entry();
  void finish(Scope& own);
  bool is_in(const Update& update) const;
  Update own_update() const;

  const int rank_;
  const ChannelKind kind_;
  const bool arrive_first_;
  ChannelId id_ = 0;

  std::vector<int> scope_of_bucket_;
  std::vector<int> buckets_in_scope_;
  std::vector<bool> submitted_;
  std::vector<Scope> scopes_;
  Step applied_ = 0;
  bool begun_ = false;
  bool waiting_announced_ = false;  // in this step
  double samples_ = 1.0;
  std::string metadata_;

  int round_ = 0;
  Step round_start_ = 0;
  bool over_ = false;     // the round has ended, and this rank has not left it yet
  bool leaving_ = false;  // leave() was called, `over` has not come yet

  bool sync_sent_ = false;
  bool lost_ = false;       // what it was told to fetch
  bool resyncing_ = false;  // waits for the state of another rank
  bool state_wanted_ = false;
  std::vector<Resync> resyncs_;
  std::deque<PastUpdate> pages_;
  std::optional<Step> fetching_;
  std::optional<Update> ready_;
  Outlook outlook_;
  Counters counters_;

  std::vector<Message> messages_;
  std::vector<Decision> reductions_;
  std::optional<CatchUp> catch_up_;
  bool holds_ = false;
  std::vector<Decision> held_;
};

}  // namespace hvd_backup
