// What the coordinator puts on record: enough to check the invariants afterwards (I2, I3, I7), to see who is late and
// by how much, to repeat the run's decisions, and to log what matters. docs/trace.md says what is written of it.
#pragma once

#include <string>
#include <vector>

#include "base/clock.h"
#include "control/messages.h"

namespace hvd_backup {

struct Record {
  enum class Event {
    opened,      // a channel: options, and reason = its description, which all ranks agree on
    decision,    // ranks, bases, arrivals and weights belong together
    dropped,     // a gradient is in no update, and why; ranks = {rank}, bases = {base}, arrivals = {when}
    replaced,    // ranks have arrived but do not deliver, and why; a decision of the next attempt follows
    stopped,     // ranks do not answer, but the others have the whole update: it is final without them
    final_,      // every contributor has the whole update: ranks, and when each had it (arrivals)
    caught_up,   // ranks = {rank} asked for `step` and what follows
    resumed,     // ranks = {rank} was late, has caught up, and begins to compute `step`
    round_over,  // step = the end
    chosen,      // another N for the steps from `step` on, and why; logged
    held,        // a decision waits for a rank, and why; logged as a warning
    beyond,      // ranks = {rank} is beyond the journal, and will take over the state of another one; logged
    resynced,    // ranks = {rank, whose state it has taken over}: it has `step` updates now; logged
    stalled,     // ranks wait for others, nothing goes on, and why; logged as a warning
    gone,        // ranks = {rank} has left for good
    lost,        // ranks = {rank} has died; `step` is the first that it has not finished
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

  // Of a decision.
  TimeUs opened_at = 0;  // since when the step could be computed
  int required = 0;      // N
  std::vector<double> weights;
  std::string metadata;

  ChannelOptions options;                    // of an opened channel
  ChannelKind kind = ChannelKind::training;  // likewise
  Squares squares;                           // of a final update, scope 0 to the last

  // About what it holds in memory.
  std::size_t bytes() const {
    return sizeof(Record) + channel.size() + reason.size() + metadata.size() + ranks.size() * sizeof(ranks[0]) +
           (bases.size() + arrivals.size() + weights.size()) * 8;
  }
};

const char* name_of(Record::Event event);

// Why a gradient was dropped that holds NaN or infinity.
inline constexpr char non_finite[] = "non-finite";

}  // namespace hvd_backup
