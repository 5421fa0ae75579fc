// The coordinator's book of one channel: who has arrived, what was decided, who is where. Pure: messages and time
// come in, messages and records go out. The Coordinator owns one for each channel and routes to it.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "control/attempt.h"
#include "control/device_groups.h"
#include "control/message_check.h"
#include "control/messages.h"
#include "control/policy.h"
#include "control/record.h"
#include "control/required_chooser.h"
#include "control/rounds.h"
#include "control/script.h"
#include "control/stall_check.h"
#include "control/state_offers.h"

namespace hvd_backup {

struct Reply {
  int to = 0;
  Message message;
};

// What the payloads of a decision's contributors, in their order, make: empty if they don't fit together.
using Combine = std::function<std::string(const Decision& decision, const std::vector<std::string>& payloads)>;

// Collects what a book has to say during one event; shared by all books of a coordinator.
struct Outbox {
  explicit Outbox(int size) : groups(size) {}

  Combine combine;  // empty: payloads are not used
  std::vector<Reply> replies;
  std::vector<Record> records;
  bool measured = false;  // the squared norms of gradients are wanted
  TimeUs stall_check_us = 0;
  bool survives_losses = false;  // when a process dies, the others can go on
  DeviceGroups groups;
  Ranks met;  // contributors of collectives that all ranks had to enter: they are not in a full collective any more
};

class ChannelBook {
 public:
  // tags: takes how many tags are wanted, returns the first of them.
  using TagSource = std::function<std::int64_t(std::int64_t)>;

  // script: decisions to be made again; null: none. Must outlive the book.
  ChannelBook(ChannelId id, const Open& first, int size, TagSource tags, Outbox& out, ChannelScript* script = nullptr);

  const std::string& name() const { return name_; }
  ChannelKind kind() const { return kind_; }
  // A collective of all ranks.
  bool strict() const { return kind_ == ChannelKind::collective && options_.required >= size_; }

  void open(int from, const Open& message, TimeUs now);
  void arrive(int from, const Arrive& message, TimeUs now);
  void withdraw(int from, const Withdraw& message, TimeUs now);
  void waiting(int from, const Waiting& message);
  void done(int from, const Done& message, TimeUs now);
  void kept(int from, const Kept& message, TimeUs now);
  void progress(int from, const Progress& message, TimeUs now);
  void sync(int from, const Sync& message, TimeUs now);
  void offered(int from, const Offered& message, TimeUs now);
  void state_lost(int from, const StateLost& message, TimeUs now);
  void begin_round(int from, const BeginRound& message, TimeUs now);
  void away(int from, const Away& message, TimeUs now);
  void leave(int from, int round, TimeUs now);
  void gone(int from, const std::string& failure, TimeUs now);
  void lost(int from, TimeUs now);  // its process has died

  // kind `collective` only: the rank is in a full collective, and so cannot contribute.
  void set_paused(int rank, bool paused, TimeUs now);
  // The rank contributes nothing more until all have joined, and with them the round is over; until then it applies the
  // updates of the others. Without backup workers it counts as a gradient of zeros, as with Horovod.
  void set_joined(int rank, bool joined, TimeUs now);

  // For Coordinator::untangle. Who waits for an update that needs others, and does nothing else meanwhile; whether
  // a rank's gradient for it is here; and: a rank's gradient for it is dropped, so that the rank goes on to something
  // else.
  Ranks blocked() const;
  bool has_arrived(int rank) const;
  // For Coordinator::end_starvation. Who waits for the state of another rank, which nobody has offered; and who could.
  Ranks starving() const;
  Ranks servers_of(int taker) const;
  bool is_short() const;                 // an attempt that was given up waits for other ranks
  bool turn_away(int rank, TimeUs now);  // false: a step that has begun goes on
  // The open step is decided in one scope, and in another there are too few finite gradients: it is made of those that
  // there are, if all who could contribute to it are `elsewhere` (in order). Returns whether it is.
  bool decide_without(const Ranks& elsewhere, TimeUs now);
  void fail(const std::string& reason, TimeUs now);  // on all ranks, for good
  // For Coordinator::settle_groups. What this group serves will not end; and whether anything that it serves goes on.
  void disbanded(GroupId group, TimeUs now);
  bool is_served_by(GroupId group) const;
  Step open_step() const { return open_step_; }
  ChannelFacts facts() const { return {open_step_, resyncs() ? 0 : history_first_, rounds_.current()}; }
  bool anybody_waits() const;

  void tick(TimeUs now);
  std::optional<TimeUs> next_deadline() const { return deadline_; }

 private:
  struct RankState {
    bool opened = false;
    bool away = false;
    bool paused = false;
    bool joined = false;
    std::string failure;       // with which it has left
    bool lost = false;         // its process has died
    bool turned_away = false;  // goes on at once, whatever the open step looks like
    Step blocked_in = -1;      // the step whose decision it waits for
    Step applied = 0;          // at least; acknowledged by asking for more
    Step reached = 0;          // at least; it has the results of all steps before
    bool said_beyond = false;  // it is on record that it is beyond the journal, and it has not come back since
    Step arrived = -1;         // the last step that it has arrived at
    Step taken_over = -1;      // the step of the state that it has taken over last
    TimeUs given_at = 0;       // when it was told of that
    TimeUs taking_us = 0;      // and how long it took
    Step contributed_to = -1;  // the newest final update that holds its gradient, in all scopes
    bool meets = false;        // its program is to see this very step, where all meet
    int round = 0;
    int joined_in = -1;                 // the newest round in which it had joined
    int misses = 0;                     // in a row
    std::optional<TimeUs> resumed_at;   // it was late, and told to start on the step for which it arrives next
    std::optional<TimeUs> began;        // with what it computes now
    std::optional<TimeUs> handicap_us;  // it was told to start on the open step so long after the others
    bool on_time = true;                // as far as its own computing goes
    std::optional<Sync> waiting;        // a Sync that has no answer yet
  };
  struct Arrival {
    int rank = 0;
    TimeUs at = 0;
    Arrive message;
  };
  struct Slot {                       // of one (step, scope)
    std::vector<Arrival> arrivals;    // once it is decided: of the contributors
    std::vector<Arrival> latecomers;  // came after the decision; may stand in for a contributor that stops
    Ranks nonfinite;                  // whose gradients hold NaN or infinity; not in order
    std::optional<Decision> decision;
    Attempt attempt;
    TimeUs decided_at = 0;  // first
    Squares squares;
    bool broken = false;    // a contributor has withdrawn, or its group is gone: this attempt will not end
    bool is_short = false;  // it is given up, but too few are there for another one
    bool is_final = false;  // this attempt has made the update
  };
  // A rank that takes over a state for the second time in a row: the first one was out of the journal when it came.
  struct Returning {
    int rank = 0;
    Step from = 0;     // what the journals keep for it
    TimeUs until = 0;  // and the others wait, if need be
  };
  using SlotKey = std::pair<Step, int>;

  // Late ranks may be left out, so a contributor may be replaced; a collective of all ranks is one of the survivors.
  bool is_replaceable() const {
    return (options_.required < size_ || (strict() && out_.survives_losses)) && script_ == nullptr;
  }
  bool is_measured() const { return out_.measured || options_.automatic; }
  int required() const { return chooser_ ? chooser_->required() : options_.required; }
  bool able(int rank) const;
  bool able(int rank, const Slot& slot) const;
  bool able_in_open_step(int rank) const;
  Outlook outlook_for(int rank) const;
  RankState& heard(int from, Step applied, int round);
  Step all_have() const;
  Step all_wanted() const;
  std::optional<std::string> held(TimeUs now);
  bool is_meeting(Step step) const;
  bool meeting_pending() const;
  void complete_opening(TimeUs now);
  void record_opened(TimeUs now);
  void settle(TimeUs now);
  bool decide_what_can(TimeUs now);
  bool close_round_if_ended(TimeUs now);
  bool decide_as_scripted(TimeUs now);
  bool is_in_vain_for_all() const;
  void choose_required(TimeUs now);
  void decide(int scope, Slot& slot, const std::string& reason, TimeUs now);
  void begin_attempt(Slot& slot, const std::string& reason, TimeUs now);
  void set_contributors(Decision& decision, const std::vector<Arrival>& arrivals) const;
  bool watch_attempts(TimeUs now);
  bool watch(Slot& slot, TimeUs now);
  bool begin_next_attempt(Slot& slot, const Suspicion& suspicion, TimeUs now);
  bool somebody_will_call() const;
  void put_given_up_on_record(Record::Event event, const Slot& slot, const Ranks& ranks, const std::string& reason,
                              TimeUs now);
  void leave_group(GroupId group, const Ranks& stopped, TimeUs now);
  // An attempt at it goes on.
  static bool is_in_work(const Slot& slot) { return slot.decision && slot.decision->votes && !slot.is_final; }
  void falls_behind(int rank, const Decision& decision);
  void make_final(Slot& slot, const Ranks& stopped, TimeUs now);
  bool is_kept(const Slot& slot, TimeUs now);
  bool contributes(int rank, Step step) const;
  bool lacks(Step step, int rank) const;
  void reopen_if_nobody_has_it(Slot& slot, TimeUs now);
  bool somebody_has(Step step) const;
  bool is_lost_to_somebody(Step step, const Ranks& contributors, const Ranks& whole_keepers) const;
  std::optional<Step> step_that_needs(int rank) const;
  std::optional<Step> unrecoverable() const;
  bool resyncs() const;
  Step has(int rank) const;
  bool is_beyond(int rank) const;
  bool anybody_beyond() const;
  void move_journal(TimeUs now);
  bool needs_state(int rank) const;
  Step needed_from(int rank) const;
  std::optional<Resync> state_for(int rank, Step have, TimeUs now);
  std::optional<std::string> held_for_returning(TimeUs now);
  void look_after_states(TimeUs now);
  void ask_for(int taker, TimeUs now);
  void ask(int server, TimeUs now);
  void ask_early(int rank, TimeUs now);
  std::optional<int> next_server(int taker) const;
  void note_taken(int rank, Step have, TimeUs now);
  void advance_open_step(TimeUs now);
  void finish_steps(TimeUs now);
  void answer(int rank, TimeUs now);
  void late(int to, const Arrive& message, TimeUs arrived_at, TimeUs now, const std::string& reason);
  void tell_late(int to, Step step, int scope);
  void put_drop_on_record(int rank, const Arrive& message, TimeUs arrived_at, TimeUs now, const std::string& reason);
  static bool holds(const std::vector<Arrival>& arrivals, int rank);
  static std::optional<Arrival> take_from(std::vector<Arrival>& arrivals, int rank);  // its own
  void dismiss_arrivals(TimeUs now, const std::string& reason);
  void look_again(TimeUs at);
  void watch_stall(TimeUs now);
  void put_stall_on_record(TimeUs since, TimeUs now);
  bool is_waiting(int rank) const;
  std::string whereabouts(int rank) const;
  Record record(Record::Event event, TimeUs now) const;

  const ChannelId id_;
  const std::string name_;
  const ChannelKind kind_;
  const ChannelOptions options_;
  const int size_;
  std::string description_;
  std::string proposal_;
  int first_rank_ = 0;
  bool wait_for_all_ = false;
  bool on_device_ = true;  // on all ranks that have opened it
  TagSource tags_;
  Outbox& out_;
  ChannelScript* const script_;
  std::optional<RequiredChooser> chooser_;

  std::vector<RankState> ranks_;
  std::vector<bool> gone_;
  Rounds rounds_;
  int scopes_ = 1;
  int buckets_ = 1;
  Step open_step_ = 0;  // the first that is not decided in all its scopes
  Step final_ = 0;      // all steps before it are final
  std::map<SlotKey, Slot> slots_;
  std::deque<PastUpdate> history_;          // steps [history_first_, final_)
  std::map<SlotKey, Ranks> whole_keepers_;  // of these, who has all shards, where others have none
  Step history_first_ = 0;
  Step kept_from_ = 0;  // the journals hold what comes from here on: what was before has fallen out
  StateOffers offers_;
  std::optional<Returning> returning_;
  TransferTime copy_time_;  // from Offer to Offered
  TimeUs opened_at_ = 0;
  TimeUs typical_us_ = 0;
  TimeUs last_opened_at_ = 0;  // of the step before the open one
  TimeUs last_took_us_ = 0;    // from then to its decision
  TransferTime transfer_time_;
  ReentryBudget reentry_;
  std::optional<TimeUs> deadline_;
  std::string failure_;
  std::string held_reason_;
  StallCheck stall_check_;
};

}  // namespace hvd_backup
