// Writes the coordinator's records as JSON lines, one object a line, flushed once for each batch:
//   {"t_us": 1234, "event": "decision", "channel": "optimizer.0", "step": 7, "scope": 0, "attempt": 0,
//    "ranks": [0, 1, 2], "bases": [7, 7, 7], "arrivals_us": [1201, 1210, 1233], "reason": "3 needed have arrived"}
// Times are microseconds since the trace began.
#pragma once

#include <fstream>
#include <string>
#include <vector>

#include "control/record.h"

namespace hvd_backup {

class Trace {
 public:
  // path empty: writes nothing. UsageError when the file can't be written.
  explicit Trace(const std::string& path);
  void write(const std::vector<Record>& records);

 private:
  std::ofstream file_;
  TimeUs began_ = 0;
};

}  // namespace hvd_backup
