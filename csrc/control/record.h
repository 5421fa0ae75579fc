// What the coordinator puts on record: enough to check the invariants afterwards (I2, I3, I7), and to log what
// matters.
#pragma once

#include <string>
#include <vector>

#include "base/clock.h"
#include "control/messages.h"

namespace hvd_backup {

struct Record {
  enum class Event {
    opened,      // all ranks that are there agree on a channel
    decision,    // ranks, bases and arrivals_us belong together
    dropped,     // a gradient came too late, or its round was over; ranks = {rank}, bases = {base}
    replaced,    // a contributor withdrew; the next attempt follows
    final_,      // every contributor has the whole update
    caught_up,   // ranks = {rank} asked for `step` and what follows
    round_over,  // step = the end
    held,        // a decision waits for a rank, and why; logged as a warning
    gone,        // ranks = {rank} has left for good
    failed,      // the channel, for good
  };

  TimeUs at = 0;
  Event event = Event::decision;
  std::string channel;
  Step step = 0;
  int scope = 0;
  int attempt = 0;
  Ranks ranks;
  std::vector<Step> bases;
  std::vector<TimeUs> arrivals;
  std::string reason;
};

const char* name_of(Record::Event event);

}  // namespace hvd_backup
