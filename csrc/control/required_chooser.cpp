#include "control/required_chooser.h"

#include <algorithm>
#include <cmath>

namespace hvd_backup {

namespace {

constexpr int averaged = 128;  // updates, about, over which norms and tails are averaged
constexpr int all_candidates = 24;

// Moves an average towards a value: a plain mean at first, then an exponential one.
void average(double& mean, double value, int count) { mean += (value - mean) / std::min(count, averaged); }

std::string ms(double us) {
  const auto tenths = static_cast<std::int64_t>(std::llround(us / 100));
  return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " ms";
}

}  // namespace

RequiredChooser::RequiredChooser(int size, int least)
    : size_(size), least_(std::clamp(least, 1, size)), required_(size), took_us_(static_cast<std::size_t>(size)) {}

void RequiredChooser::computed(int rank, Step step, TimeUs took_us) {
  auto& own = took_us_[static_cast<std::size_t>(rank)];
  own[step] = static_cast<double>(took_us);
  own.erase(own.begin(), own.lower_bound(step - window + 1));
}

void RequiredChooser::finished(TimeUs tail_us) { average(tail_us_, static_cast<double>(tail_us), ++finished_); }

void RequiredChooser::measured(const Squares& squares, const std::vector<double>& weights) {
  const auto k = static_cast<double>(weights.size());
  double inverse = 0;  // mean of 1 / w_i
  double total = 0;
  for (const double weight : weights) {
    inverse += 1 / weight / k;
    total += weight;
  }
  const double apart = inverse - 1 / total;
  if (weights.size() < 2 || !(apart > 0) || !std::isfinite(squares.contributions) || !(squares.mean > 0)) return;
  const double noise = (squares.contributions / k - squares.mean) / apart;
  ++measured_;
  average(noise_, noise, measured_);
  average(signal_, squares.mean - noise / total, measured_);
  average(weight_, total / k, measured_);
}

std::optional<double> RequiredChooser::noise_scale() const {
  if (measured_ == 0 || !(signal_ > 0)) return std::nullopt;
  return std::max(noise_, 0.0) / signal_ / weight_;
}

double RequiredChooser::worth(int required) const {
  const std::optional<double> scale = noise_scale();
  return scale ? required / (required + *scale) : required;
}

// A rank that has skipped steps counts in them with its other steps, in turn; one that is stuck in a step counts with
// that as well.
std::vector<double> RequiredChooser::recent_times(Step step, const std::vector<TimeUs>& busy_us) const {
  const Step first = std::max<Step>(0, step - window);
  const auto n = static_cast<std::size_t>(size_);
  std::vector<double> times(static_cast<std::size_t>(step - first) * n, 0.0);
  for (std::size_t rank = 0; rank < n; ++rank) {
    std::vector<double> known;
    for (auto own = took_us_[rank].lower_bound(first); own != took_us_[rank].end(); ++own) known.push_back(own->second);
    const auto busy = static_cast<double>(busy_us[rank]);
    if (busy > 0 && (known.empty() || busy > known.back())) known.push_back(busy);
    if (known.empty() && !took_us_[rank].empty()) known.push_back(took_us_[rank].rbegin()->second);
    if (known.empty()) return {};  // nothing is known of this rank yet
    for (Step at = first; at < step; ++at) {
      const auto own = took_us_[rank].find(at);
      const auto row = static_cast<std::size_t>(at - first);
      times[row * n + rank] = own != took_us_[rank].end() ? own->second : known[row % known.size()];
    }
  }
  return times;
}

std::vector<int> RequiredChooser::candidates() const {
  std::vector<int> all;
  for (int backups = 0; backups <= size_ - least_;) {
    all.push_back(size_ - backups);
    backups += size_ - least_ <= all_candidates ? 1 : std::max(1, backups / 4);
  }
  if (std::find(all.begin(), all.end(), required_) == all.end()) all.push_back(required_);
  return all;
}

std::optional<std::string> RequiredChooser::look(Step step, const std::vector<TimeUs>& busy_us) {
  if (step < next_look_) return std::nullopt;
  next_look_ = step + every;
  const std::vector<double> times = recent_times(step, busy_us);
  if (times.empty()) return std::nullopt;
  struct Option {
    int required;
    Forecast forecast;
    double progress;  // per microsecond
  };
  const auto evaluate = [&](int required) {
    Option option{required, forecast({size_, times}, {required, tail_us_, tail_us_, true}), 0};
    option.progress = worth(required) / option.forecast.update_us;
    return option;
  };
  const Option present = evaluate(required_);
  Option best = present;
  for (const int required : candidates()) {
    if (required == required_) continue;
    Option option = evaluate(required);
    if (option.progress > best.progress) best = std::move(option);
  }
  if (best.progress < clearly * present.progress) return std::nullopt;
  required_ = best.required;
  next_look_ = step + 2 * every;
  const std::optional<double> scale = noise_scale();
  const double relative = worth(best.required) / worth(present.required);
  return "waits for " + std::to_string(best.required) + " of " + std::to_string(size_) + " ranks instead of " +
         std::to_string(present.required) + ": " + ms(best.forecast.update_us) + " per update instead of " +
         ms(present.forecast.update_us) + ", each worth " + std::to_string(std::lround(100 * relative)) +
         " % of those (gradient noise scale " +
         (scale ? std::to_string(std::lround(*scale)) + " batches of a rank" : "not known: taken as infinite") + ")";
}

}  // namespace hvd_backup
