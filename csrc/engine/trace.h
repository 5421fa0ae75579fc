// The coordinator's records as JSON lines, one object a line; docs/trace.md says what they hold. A Trace writes them
// to a file, each batch at once, so that what a killed run leaves is readable up to its last line. A Recording keeps
// the newest in memory, within a bound, for those who ask while the run goes on. Rank 0's engine has one of each.
// Times are microseconds since recording began; the header says when that was.
#pragma once

#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "control/record.h"

namespace hvd_backup {

// What every reader needs to make sense of the rest: the first line.
struct TraceHeader {
  int size = 1;         // ranks
  TimeUs began_us = 0;  // on the monotonic clock
  double began_unix_s = 0;
};

std::string to_json(const TraceHeader& header);
// with_metadata: false when it is that of the decision before.
std::string to_json(const Record& record, TimeUs began_us, bool with_metadata);

class Trace {
 public:
  // path empty: writes nothing. UsageError when the file can't be written.
  Trace(const std::string& path, const TraceHeader& header);
  void write(const std::vector<Record>& records);

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };

  const TraceHeader header_;
  std::unique_ptr<std::FILE, Close> file_;
  std::map<std::string, std::string> metadata_;  // of each channel's last decision
  std::string lines_;
};

class Recording {
 public:
  static constexpr std::size_t most_bytes = std::size_t{16} << 20;

  explicit Recording(const TraceHeader& header) : header_(header) {}
  void keep(const std::vector<Record>& records);
  // As a trace file would have it, of each channel's newest `last` steps; without what has been forgotten.
  std::string text(Step last) const;

 private:
  const TraceHeader header_;
  std::deque<Record> opened_;  // kept whatever comes
  std::deque<Record> records_;
  std::size_t bytes_ = 0;
};

}  // namespace hvd_backup
