// The coordinator's records as a Chrome trace, for chrome://tracing and ui.perfetto.dev: one process for each training
// channel, one track for each rank with what it did when, as far as rank 0 knows: compute, wait (from its arrival until
// the decision), reduce (until it has the update), and for late ranks compute (dropped) and catch-up. Arrivals and
// drops are marks. With decisions by bucket the first one stands for the step.
//
// The file is a JSON array that is never closed: both readers take it so, and what a killed run leaves is readable.
#pragma once

#include <cstdio>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "control/record.h"

namespace hvd_backup {

class Timeline {
 public:
  // path empty: writes nothing. UsageError when the file can't be written.
  Timeline(const std::string& path, int size, TimeUs began_us);
  void write(const std::vector<Record>& records);

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  struct Track {                        // of a rank
    std::optional<TimeUs> began;        // to compute
    std::optional<TimeUs> catching_up;  // since when
  };
  struct Channel {
    int process = 0;
    Step next_final = 0;
    std::vector<Track> tracks;
    std::map<Step, std::vector<Record>> waiting;  // for the update before theirs to be final
  };

  void take(Channel& channel, const Record& record);
  void final_update(Channel& channel, const Record& record);
  void dropped(Channel& channel, const Record& record);
  void open(const Record& record);
  void slice(int process, int rank, const char* name, TimeUs from, TimeUs to, Step step);
  void mark(int process, int rank, const char* name, TimeUs at, Step step);
  void line(const std::string& event);

  const int size_;
  const TimeUs began_us_;
  std::unique_ptr<std::FILE, Close> file_;
  std::map<std::string, Channel> channels_;  // of kind `training`
  std::string lines_;
};

}  // namespace hvd_backup
