// When a channel's rounds end (design, rule 7). A round is a stretch of steps after which all ranks do something else
// together (an epoch's evaluation, say); rounds are numbered from 0, each begins where the one before ended.
//
//   followed, lengths known     ends after max(length) steps
//   followed, a length unknown  ends when every rank that is left is away
//   not followed                ends at once when the first rank leaves
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "control/messages.h"

namespace hvd_backup {

class Rounds {
 public:
  explicit Rounds(int size) : lengths_(static_cast<std::size_t>(size)), begun_(static_cast<std::size_t>(size), false) {}

  int current() const { return static_cast<int>(ends_.size()); }
  Step start() const { return ends_.empty() ? 0 : ends_.back(); }  // of the current round
  bool followed() const { return followed_; }
  std::int64_t align_every() const { return align_every_; }
  bool is_over(int round) const { return round < current(); }
  Step end_of(int round) const { return ends_[static_cast<std::size_t>(round)]; }

  // `rank` follows the current round with `length` steps (-1: unknown).
  void begin(int rank, std::int64_t length, std::int64_t align_every) {
    lengths_[static_cast<std::size_t>(rank)] = length;
    begun_[static_cast<std::size_t>(rank)] = true;
    followed_ = true;
    align_every_ = align_every;
  }

  bool has_begun(int rank) const { return begun_[static_cast<std::size_t>(rank)]; }  // the current round

  // The step at which the current round ends, as far as lengths tell. A rank that has not begun this round yet counts
  // with its length in the one before; before the first one, nothing is known until all have begun. `gone` ranks
  // don't count.
  std::optional<Step> planned_end(const std::vector<bool>& gone) const {
    if (fixed_end_) return fixed_end_;
    if (!followed_) return std::nullopt;
    std::int64_t longest = 0;
    for (std::size_t rank = 0; rank < lengths_.size(); ++rank) {
      if (gone[rank]) continue;
      if (!lengths_[rank] || *lengths_[rank] < 0) return std::nullopt;
      longest = std::max(longest, *lengths_[rank]);
    }
    return start() + longest;
  }

  // The current round will end at `step`, whatever the lengths say.
  void fix_end(Step step) { fixed_end_ = step; }
  bool ends_early() const { return fixed_end_.has_value(); }

  // Where the last round has ended, all ranks were to meet.
  bool ended_in_meeting() const { return ended_in_meeting_; }

  void close(Step end) {
    const bool is_meeting = followed_ && align_every_ > 0 && end % align_every_ == 0;
    ended_in_meeting_ = is_meeting || (ended_in_meeting_ && end == start());  // nobody is further than before
    ends_.push_back(end);
    followed_ = false;
    begun_.assign(begun_.size(), false);
    fixed_end_.reset();
  }

 private:
  std::vector<Step> ends_;                            // of the rounds that are over
  std::vector<std::optional<std::int64_t>> lengths_;  // last given by each rank
  std::vector<bool> begun_;                           // this round, by rank
  bool followed_ = false;
  std::int64_t align_every_ = 0;
  bool ended_in_meeting_ = false;
  std::optional<Step> fixed_end_;
};

}  // namespace hvd_backup
