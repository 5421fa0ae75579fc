// May the coordinator believe what it is told? Bytes that decode are a message, but its numbers may still be none that
// a rank of this job can send: a step that nobody has reached, a scope that does not exist, a million of them. They
// index and size what the coordinator keeps, so each is checked once, here, before anything looks at it. What it is
// not: a check of wrong use, which is found where it is made, with better words.
#pragma once

#include "control/messages.h"

namespace hvd_backup {

// What is known of the channel that a message names.
struct ChannelFacts {
  Step open_step = 0;     // nobody has got beyond it
  Step first_known = 0;   // every rank has the updates before it
  int current_round = 0;  // nobody has got beyond it
};

// From a job far larger than any. Not more, because the coordinator keeps something for each bucket.
inline constexpr std::int32_t most_buckets = 1 << 16;
// Steps and microseconds of sense stay so far below the largest number that sums of two are numbers, too.
inline constexpr std::int64_t most_steps = std::int64_t{1} << 61;

// RuntimeFailure when a rank of `size` cannot have sent it. `facts` of no channel when the message names none.
void check_message(const Message& message, int size, const ChannelFacts& facts);

}  // namespace hvd_backup
