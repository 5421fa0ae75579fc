// backup_workers="auto": chooses N, the number of contributors that updates wait for, while the run goes on. Pure.
//
// Progress per second is what one update is worth, over what it takes:
//   worth   N / (N + B): the loss that an update saves with a batch of N ranks, relative to one without noise, where B
//           is the gradient noise scale in batches of a rank (McCandlish et al. 2018, arXiv 1812.06162, section 2.2);
//   time    what `forecast` says for N, from the computing times of the last steps.
// B = S / |G|^2 comes from the squared norms that the reduction computes (appendix A.1 there): over k contributions
// with w_i samples, W in all, E|g_i|^2 = |G|^2 + S / w_i and E|mean|^2 = |G|^2 + S / W. S and |G|^2 are averaged
// over many steps before they are divided. As long as nothing was measured, B counts as infinite: an update is worth N.
//
// N changes only when another one promises clearly more, and not often, so it does not follow noise.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "control/forecast.h"
#include "control/messages.h"

namespace hvd_backup {

class RequiredChooser {
 public:
  static constexpr Step window = 64;       // steps whose computing times count
  static constexpr Step every = 8;         // steps between two looks; twice as many after a change
  static constexpr double clearly = 1.03;  // times the progress per second of the present N

  // least: N is never below it. Begins with all ranks, which shows how fast each is.
  RequiredChooser(int size, int least);

  int required() const { return required_; }

  // A rank has computed `step` for so long.
  void computed(int rank, Step step, TimeUs took_us);
  // An update took so long from its decision until its contributors had it.
  void finished(TimeUs tail_us);
  // The squared norms of an update, and the samples of its contributors.
  void measured(const Squares& squares, const std::vector<double>& weights);

  // Before `step` opens. busy_us: how long each rank has been computing what it computes now; 0: it waits.
  // Returns why N was changed, if it was.
  std::optional<std::string> look(Step step, const std::vector<TimeUs>& busy_us);

  // B, in batches of a rank; empty: infinite, or not known.
  std::optional<double> noise_scale() const;

 private:
  std::vector<double> recent_times(Step step, const std::vector<TimeUs>& busy_us) const;
  std::vector<int> candidates() const;
  double worth(int required) const;

  const int size_;
  const int least_;
  int required_;
  Step next_look_ = every;
  std::vector<std::map<Step, double>> took_us_;  // by rank
  double tail_us_ = 0;
  int finished_ = 0;
  double noise_ = 0;   // S, averaged
  double signal_ = 0;  // |G|^2, averaged
  double weight_ = 1;  // samples of a rank, averaged
  int measured_ = 0;
};

}  // namespace hvd_backup
