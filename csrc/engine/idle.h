// How long the engine thread sleeps when it finds nothing to do. Pure.
//
// MPI can only be asked, so a sleeping engine answers late. It may be late by 2 % of the time that it has been idle:
// short naps while something is going on, long ones in a long forward pass. So the delay never matters, and an idle
// thread polls 50 times for each factor e of idle time, then 500 times a second at most.
#pragma once

#include <algorithm>

#include "base/clock.h"

namespace hvd_backup {

// Until then a thread that has nothing to do yields instead of sleeping: a reply within a data exchange takes that
// long.
inline constexpr TimeUs spin_us = 50;

// 0: yield. transfers: something large is on its way, and its other end needs us.
inline TimeUs nap_us(TimeUs idle_us, bool transfers) {
  if (idle_us < spin_us) return 0;
  const TimeUs longest = transfers ? 50 : 2000;
  return std::clamp<TimeUs>(idle_us / 50, std::min<TimeUs>(50, longest), longest);
}

}  // namespace hvd_backup
