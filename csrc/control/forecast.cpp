#include "control/forecast.h"

#include <algorithm>
#include <limits>
#include <string>

#include "base/error.h"
#include "control/policy.h"

namespace hvd_backup {

namespace {

// When a rank that is free since `free_at` starts with the step that opened at `opened`.
double start_of(double free_at, double opened, double typical) {
  if (free_at <= opened) return opened;
  ResumeView view;
  view.now = static_cast<TimeUs>(free_at);
  view.opened = static_cast<TimeUs>(opened);
  view.typical_us = static_cast<TimeUs>(typical);
  const Verdict verdict = resume_now(view);
  return verdict.yes || !verdict.look_again ? free_at : static_cast<double>(*verdict.look_again);
}

}  // namespace

Forecast forecast(const ComputingTimes& times, const ForecastOptions& options) {
  const auto n = static_cast<std::size_t>(times.ranks);
  const std::size_t steps = times.steps();
  if (options.required < 1 || options.required > times.ranks || steps == 0) {
    throw UsageError("forecast: N = " + std::to_string(options.required) + " of " + std::to_string(times.ranks) +
                     " ranks over " + std::to_string(steps) + " steps: expected 1 <= N <= ranks and a step");
  }
  std::vector<double> free_at(n, 0.0);  // when a rank can start something new
  std::vector<double> arrivals(n), sorted(n);
  Forecast found;
  found.contributed.assign(n, 0.0);
  double opened = 0;
  double typical = 0;
  for (std::size_t step = 0; step < steps; ++step) {
    for (std::size_t r = 0; r < n; ++r) {
      const double began = options.carry_over ? start_of(free_at[r], opened, typical) : opened;
      arrivals[r] = began + times.at(step, static_cast<int>(r));
    }
    sorted = arrivals;
    const auto nth = sorted.begin() + (options.required - 1);
    std::nth_element(sorted.begin(), nth, sorted.end());
    const double decided = *nth;
    for (std::size_t r = 0; r < n; ++r) {
      if (arrivals[r] <= decided) {
        found.contributed[r] += 1;
        free_at[r] = decided + options.tail_us;
      } else if (arrivals[r] - times.at(step, static_cast<int>(r)) < decided) {
        free_at[r] = arrivals[r] + options.catch_up_us;  // late: it ends what it has begun
      }
    }
    const double took = decided - opened;
    typical = typical == 0 ? took : typical + (std::min(took, 4 * typical) - typical) / 8;
    opened = decided + options.tail_us;
  }
  found.update_us = opened / static_cast<double>(steps);
  for (double& share : found.contributed) share /= static_cast<double>(steps);
  return found;
}

}  // namespace hvd_backup
