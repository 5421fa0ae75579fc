// How long an update would take with N contributors: a small simulation of the rules of this layer over measured
// computing times. With backup workers a late rank carries its work over into the next steps, so order statistics of
// the times alone would promise too much or too little. Used by `auto` (required_chooser.h) and by `hvd-backup plan`.
//
// The model, for each step:
//   - it opens when the last one is decided and its update, `tail_us` later, has reached its contributors;
//   - a contributor of the last step starts at once; a late rank that has caught up, too;
//   - a rank that is still busy ends its old work, catches up, and starts if resume_now (policy.h) says so;
//   - the N-th arrival decides. Who started and has not arrived is late.
// Left out: grace, max_misses and re-entry waits, and the coordinator's own time.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "base/clock.h"

namespace hvd_backup {

// Microseconds that each rank computes: ranks of a step side by side, step after step.
struct ComputingTimes {
  int ranks = 1;
  std::span<const double> us;
  std::size_t steps() const { return us.size() / static_cast<std::size_t>(ranks); }
  double at(std::size_t step, int rank) const {
    return us[step * static_cast<std::size_t>(ranks) + static_cast<std::size_t>(rank)];
  }
};

struct ForecastOptions {
  int required = 1;        // N
  double tail_us = 0;      // from a decision until its contributors have the update
  double catch_up_us = 0;  // from a late arrival until the rank has what it missed
  bool carry_over = true;  // false: every rank starts every step on time (independent steps)
};

struct Forecast {
  double update_us = 0;             // mean
  std::vector<double> contributed;  // by rank: share of the updates that it is part of
};

Forecast forecast(const ComputingTimes& times, const ForecastOptions& options);

}  // namespace hvd_backup
