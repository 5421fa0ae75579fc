// The part of a ChannelBook that says who waits for whom, when nothing goes on.
#include "control/channel_book.h"

namespace hvd_backup {

// Its training thread can do nothing before others have done something.
bool ChannelBook::is_waiting(int rank) const {
  const RankState& state = ranks_[static_cast<std::size_t>(rank)];
  if (gone_[static_cast<std::size_t>(rank)]) return false;
  if (wait_for_all_) return state.opened;
  return state.waiting || has_arrived(rank) || contributes(rank, open_step_ - 1);
}

void ChannelBook::watch_stall(TimeUs now) {
  bool somebody_waits = false;
  std::int64_t opened = 0;
  for (int r = 0; r < size_; ++r) {
    somebody_waits = somebody_waits || is_waiting(r);
    opened += ranks_[static_cast<std::size_t>(r)].opened ? 1 : 0;
  }
  const std::int64_t progress = 4 * (open_step_ + final_ + rounds_.current()) + opened;
  const auto since = stall_check_.look(somebody_waits, progress, now);
  if (const auto again = stall_check_.look_again()) look_again(*again);
  if (since) put_stall_on_record(*since, now);
}

void ChannelBook::put_stall_on_record(TimeUs since, TimeUs now) {
  std::string waiting, others;
  Record stalled = record(Record::Event::stalled, now);
  for (int r = 0; r < size_; ++r) {
    if (is_waiting(r)) {
      stalled.ranks.push_back(r);
      waiting += (waiting.empty() ? "" : ", ") + std::to_string(r);
    } else if (!gone_[static_cast<std::size_t>(r)]) {
      others += (others.empty() ? "rank " : "; rank ") + std::to_string(r) + " " + whereabouts(r);
    }
  }
  stalled.step = open_step_;
  stalled.reason = (stalled.ranks.size() == 1 ? "rank " + waiting + " has" : "ranks " + waiting + " have") +
                   " waited for " + std::to_string((now - since) / 1'000'000) + " s at step " +
                   std::to_string(open_step_) +
                   (wait_for_all_ ? " for all ranks to create it" : " (N = " + std::to_string(required()) + ")") +
                   ": " + (others.empty() ? "all ranks wait, some of them for something else" : others);
  out_.records.push_back(stalled);
}

std::string ChannelBook::whereabouts(int rank) const {
  const RankState& state = ranks_[static_cast<std::size_t>(rank)];
  if (!state.opened) return "has not created it";
  if (state.joined) return "has joined";
  if (state.paused) return "is in a full collective";
  if (state.away) return "has left the loop";
  return "is at step " + std::to_string(std::max(state.reached, state.applied)) + ", and was last heard " +
         (state.arrived < 0 ? "before its first gradient"
                            : "with its gradient for step " + std::to_string(state.arrived));
}

}  // namespace hvd_backup
