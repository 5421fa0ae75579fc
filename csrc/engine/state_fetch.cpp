#include "engine/state_fetch.h"

#include <algorithm>
#include <utility>

namespace hvd_backup {

StateFetch::StateFetch(Transport& transport, SendPull send_pull, NextTag next_tag, const Resync& promised,
                       OnState on_state)
    : transport_(transport),
      send_pull_(std::move(send_pull)),
      next_tag_(std::move(next_tag)),
      promised_(promised),
      on_state_(std::move(on_state)),
      state_(std::make_shared<State>(static_cast<std::size_t>(promised.bytes))) {}

void StateFetch::start(TimeUs now) {
  progress_at_ = now;
  if (state_->size() == 0) {
    arrived(0);
    return;
  }
  for (int piece = 0; piece < pieces_at_once; ++piece) ask_next();
}

bool StateFetch::is_overdue(TimeUs now) {
  if (ended_ || was_overdue_ || now - progress_at_ < piece_time_.patience_us()) return false;
  was_overdue_ = true;
  return true;
}

void StateFetch::ask_next() {
  const std::size_t bytes = std::min(piece_bytes, state_->size() - asked_);
  if (bytes == 0) return;
  const std::size_t begin = std::exchange(asked_, asked_ + bytes);
  const Tag tag = next_tag_();
  transport_.start_receive(promised_.server, tag, {state_->data() + begin, bytes},
                           [self = shared_from_this(), bytes] { self->arrived(bytes); });
  send_pull_(promised_.server, PullState{promised_.channel, promised_.step, static_cast<std::int64_t>(begin),
                                         static_cast<std::int64_t>(bytes), tag});
}

void StateFetch::arrived(std::size_t bytes) {
  here_ += bytes;
  if (ended_) return;
  const TimeUs now = monotonic_us();
  piece_time_.measured(now - std::exchange(progress_at_, now));
  if (here_ < state_->size()) {
    ask_next();
    return;
  }
  ended_ = true;
  on_state_(promised_, state_);
}

}  // namespace hvd_backup
