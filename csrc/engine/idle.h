// How long the engine thread sleeps when it finds nothing to do. Pure.
//
// MPI can only be asked, so a sleeping engine answers late. It may be late by 2 % of the time that it has been idle:
// short naps while something is going on, long ones in a long forward pass, where an idle thread polls 50 times for
// each factor e of idle time, then 500 times a second at most. While somebody waits, a core is free, and it polls more.
#pragma once

#include <algorithm>

#include "base/clock.h"

namespace hvd_backup {

// Until then a thread that has nothing to do yields instead of sleeping: a reply within a data exchange takes that
// long when threads share cores. A small allreduce is a chain of a few messages; with a nap in each link it takes twice
// as long. It costs no more than two short naps after each burst of work.
inline constexpr TimeUs spin_us = 200;

enum class Expecting {
  nothing,   // the training thread computes
  message,   // somebody waits for what the next message brings
  transfer,  // something large is on its way, and its other end needs us
};

// 0: yield.
inline TimeUs nap_us(TimeUs idle_us, Expecting expecting) {
  if (idle_us < spin_us) return 0;
  const TimeUs longest = expecting == Expecting::transfer ? 50 : expecting == Expecting::message ? 200 : 2000;
  return std::clamp<TimeUs>(idle_us / 50, 50, longest);
}

}  // namespace hvd_backup
