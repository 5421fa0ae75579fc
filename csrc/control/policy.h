// The two judgements of the coordinator, as pure functions of what is known now: does a decision close, and may a
// rank that has caught up start on the open step? Each returns the verdict, when to look again, and one sentence why.
#pragma once

#include <optional>
#include <string>

#include "base/clock.h"

namespace hvd_backup {

struct CloseView {
  int required = 1;       // N
  int arrived = 0;        // gradients for this decision
  int able = 0;           // ranks that have not arrived and still can
  int nonfinite = 0;      // gradients that have arrived and may not count
  bool owed = false;      // one of the able has been left out max_misses times in a row
  TimeUs reentry_us = 0;  // see ReentryBudget; the longest among the able
  TimeUs now = 0;
  TimeUs grace_us = 0;
  std::optional<TimeUs> nth_arrival;  // when the number needed was reached; empty: not yet
};

struct Verdict {
  bool yes = false;
  std::optional<TimeUs> look_again;  // time alone may change the verdict then
  std::string reason;
};

// How many arrivals close a decision: N, capped by the ranks that still can contribute, and at least one. (When all
// gradients are non-finite it closes without any: nothing is applied, and the ranks go on to the next step.)
int needed_arrivals(int required, int arrived, int able);

Verdict close_decision(const CloseView& view);

// A rank that was late has to fetch the update that the others hold already, so it starts the next step behind them
// by its handicap; among equally fast ranks it would be late for ever, though it is on time in all that it does
// itself. So a decision waits that long for such a rank, from a budget: 1/32 of the time, and one step's time at once
// at most. A rank that was slow in what it does itself is not waited for, so a straggler costs nothing.
class ReentryBudget {
 public:
  static constexpr TimeUs share = 32;  // the reciprocal of the budget

  // How long to wait after the N-th arrival for a rank that is on time in what it does itself and began the open step
  // `handicap` after the others: 0 when too little is left.
  TimeUs wait_us(TimeUs handicap_us, TimeUs typical_us) const;

  void step_decided(TimeUs typical_us);
  void spend(TimeUs waited_us) { saved_us_ = saved_us_ > waited_us ? saved_us_ - waited_us : 0; }

 private:
  TimeUs saved_us_ = 0;
};

// Whether a rank that took so long from its start to its arrival is as fast as the others, up to their scatter, when
// they have decided the same step `decided_us` after it opened.
inline bool is_on_time(TimeUs took_us, TimeUs decided_us) { return took_us <= decided_us + decided_us / 8; }

struct ResumeView {
  TimeUs now = 0;
  TimeUs opened = 0;      // since when the open step can be computed
  TimeUs typical_us = 0;  // how long a step is usually open before its decision; 0: not known yet
  bool needed = false;    // the decision can't close without this rank, or it is owed its turn
};

// A late rank that starts in the middle of a step will be late for it as well, and so on for ever, though it is as
// fast as the others. So it waits for the next step, unless the open one is young (then it can be a backup, and come
// back), or this rank is needed, or the step is overdue (somebody else is slow, and starting may help).
Verdict resume_now(const ResumeView& view);

}  // namespace hvd_backup
