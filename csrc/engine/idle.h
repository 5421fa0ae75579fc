// How long the engine thread sleeps when it finds nothing to do. Pure.
//
// MPI can only be asked, so a sleeping engine answers late. It may be late by 2 % of the time that it has been idle:
// short naps while something is going on, long ones in a long forward pass, where an idle thread polls 50 times for
// each factor e of idle time, then 400 times a second at most. While somebody waits, a core is free, and it polls more.
#pragma once

#include <algorithm>

#include "base/clock.h"

namespace hvd_backup {

// Until then a thread that has nothing to do yields instead of sleeping: a reply within a data exchange takes that
// long when threads share cores. A small allreduce is a chain of a few messages; with a nap in each link it takes twice
// as long, and once one rank naps, the others wait long enough to nap, too. A training thread that waits has nothing
// better to do with its core than to yield it; the engine thread may be in the way of one that computes.
inline constexpr TimeUs waiting_thread_spins_us = 500;
inline constexpr TimeUs engine_thread_spins_us = 200;

enum class Expecting {
  nothing,   // the training thread computes
  message,   // somebody waits for what the next message brings
  transfer,  // something large is on its way, and its other end needs us
};

// 0: yield.
inline TimeUs nap_us(TimeUs idle_us, Expecting expecting, TimeUs spins_us) {
  if (idle_us < spins_us) return 0;
  const TimeUs longest = expecting == Expecting::transfer ? 50 : expecting == Expecting::message ? 200 : 2500;
  return std::clamp<TimeUs>(idle_us / 50, 50, longest);
}

}  // namespace hvd_backup
