// Time as the control layer sees it: microseconds that are handed in, never asked for. Only the engine reads a clock.
#pragma once

#include <chrono>
#include <cstdint>

namespace hvd_backup {

using TimeUs = std::int64_t;

// The monotonic clock of this machine.
inline TimeUs monotonic_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace hvd_backup
