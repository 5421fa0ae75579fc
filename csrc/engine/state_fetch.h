// Fetches the state that another rank has offered, piece by piece, two of them on their way at a time: so it is seen
// when nothing comes any more. Then the coordinator is told, which may know of another one; this one goes on, and
// whichever is complete first wins. Pulled, never pushed: only this rank waits.
#pragma once

#include <functional>
#include <memory>

#include "base/clock.h"
#include "control/attempt.h"
#include "engine/state.h"
#include "transport/transport.h"

namespace hvd_backup {

class StateFetch : public std::enable_shared_from_this<StateFetch> {
 public:
  static constexpr std::size_t piece_bytes = std::size_t{4} << 20;
  static constexpr int pieces_at_once = 2;

  using SendPull = std::function<void(int server, const PullState& pull)>;
  using NextTag = std::function<Tag()>;
  using OnState = std::function<void(const Resync& promised, std::shared_ptr<const State> state)>;

  StateFetch(Transport& transport, SendPull send_pull, NextTag next_tag, const Resync& promised, OnState on_state);

  void start(TimeUs now);
  // True, once: nothing has come for longer than the pieces before let expect.
  bool is_overdue(TimeUs now);
  void give_up() { ended_ = true; }
  bool ended() const { return ended_; }
  const Resync& promised() const { return promised_; }

 private:
  void ask_next();
  void arrived(std::size_t bytes);

  Transport& transport_;
  const SendPull send_pull_;
  const NextTag next_tag_;
  const Resync promised_;
  const OnState on_state_;
  std::shared_ptr<State> state_;
  std::size_t asked_ = 0;  // bytes
  std::size_t here_ = 0;
  TimeUs progress_at_ = 0;
  TransferTime piece_time_;
  bool was_overdue_ = false;
  bool ended_ = false;
};

}  // namespace hvd_backup
