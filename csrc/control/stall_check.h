// When to warn that a channel stands still: some rank has waited for others for so long, and nothing was decided. Pure.
#pragma once

#include <cstdint>
#include <optional>

#include "base/clock.h"

namespace hvd_backup {

class StallCheck {
 public:
  explicit StallCheck(TimeUs after_us) : after_us_(after_us) {}  // 0: never

  // progress: a number that changes whenever the channel goes on. Returns since when it stands still, if that is to be
  // said now: again after every multiple of the time.
  std::optional<TimeUs> look(bool somebody_waits, std::int64_t progress, TimeUs now) {
    if (!somebody_waits || !since_ || progress != progress_) {
      progress_ = progress;
      since_ = somebody_waits ? std::optional(now) : std::nullopt;
      said_ = 0;
    }
    if (after_us_ <= 0 || !since_ || now < *since_ + (said_ + 1) * after_us_) return std::nullopt;
    said_ = (now - *since_) / after_us_;
    return since_;
  }

  std::optional<TimeUs> look_again() const {
    if (after_us_ <= 0 || !since_) return std::nullopt;
    return *since_ + (said_ + 1) * after_us_;
  }

 private:
  const TimeUs after_us_;
  std::int64_t progress_ = -1;
  std::optional<TimeUs> since_;
  std::int64_t said_ = 0;
};

}  // namespace hvd_backup
