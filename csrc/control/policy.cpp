#include "control/policy.h"

#include <algorithm>

namespace hvd_backup {

int needed_arrivals(int required, int arrived, int able) { return std::max(1, std::min(required, arrived + able)); }

Verdict close_decision(const CloseView& view) {
  if (view.arrived == 0 && view.able == 0 && view.nonfinite > 0) return {true, {}, "no gradient is finite"};
  const int needed = needed_arrivals(view.required, view.arrived, view.able);
  if (view.arrived < needed || !view.nth_arrival) {
    return {false, {}, std::to_string(view.arrived) + " of " + std::to_string(needed) + " have arrived"};
  }
  if (view.able == 0) return {true, {}, "all that can have arrived"};
  if (view.owed) return {false, {}, "waiting for a rank that was left out max_misses times in a row"};
  const TimeUs deadline = *view.nth_arrival + std::max(view.grace_us, view.reentry_us);
  if (view.now < deadline) {
    return {false, deadline,
            view.reentry_us > view.grace_us ? "a rank that has caught up comes back" : "the grace time runs"};
  }
  return {true, {}, std::to_string(needed) + " needed have arrived"};
}

TimeUs ReentryBudget::wait_us(TimeUs handicap_us, TimeUs typical_us) const {
  const TimeUs wait = handicap_us + typical_us / 32;  // its own arrival scatters like everybody's
  return saved_us_ >= wait ? wait : 0;
}

void ReentryBudget::step_decided(TimeUs typical_us) {
  const TimeUs more = typical_us / share;
  saved_us_ = std::min(saved_us_ + more, typical_us);
}

Verdict resume_now(const ResumeView& view) {
  if (view.needed) return {true, {}, "this rank is needed"};
  if (view.typical_us == 0) return {true, {}, "no step has been timed yet"};
  const TimeUs elapsed = view.now - view.opened;
  const TimeUs overdue = view.typical_us + view.typical_us / 4;
  if (elapsed >= overdue) return {true, {}, "the open step is overdue"};
  if (elapsed <= view.typical_us / 4) return {true, {}, "the open step is young"};
  return {false, view.opened + overdue, "waiting for the next step"};
}

}  // namespace hvd_backup
