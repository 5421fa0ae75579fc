// Fetches one missed update from the journals of its contributors, shard by shard. Pulled, never pushed: only this
// rank waits. A keeper that does not answer in time is not waited for, or refuses (it had stopped before it had the
// shard): then the next contributor is asked as well, first the neighbour, which keeps the same shard, then the others,
// which do after a fault. Whoever is first wins. Every request has a buffer of its own, so a late answer can't touch
// anything. Who has not answered once is asked last in the fetches that follow.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/clock.h"
#include "control/member.h"
#include "engine/channel.h"
#include "transport/transport.h"

namespace hvd_backup {

class Fetch : public std::enable_shared_from_this<Fetch> {
 public:
  using SendPull = std::function<void(int keeper, const Pull& pull)>;
  using NextTag = std::function<Tag()>;
  // asked_at: when whoever has answered last was asked.
  using OnFetched = std::function<void(TimeUs asked_at)>;

  // silent: who has not answered so far, and is asked last; who does not now is added. It outlives this.
  // patience_us: how long to wait for an answer before the next one is asked, too (measured by the caller).
  Fetch(Transport& transport, SendPull send_pull, NextTag next_tag, ChannelId channel, const CatchUp& missed,
        const std::vector<Bucket>& buckets, std::set<int>& silent, TimeUs patience_us, OnFetched on_fetched);

  void start(TimeUs now);
  void tick(TimeUs now);
  // Who was asked does not have it. Returns false when nobody has, again and again.
  bool refused(const Pull& pull, TimeUs now);
  bool is_hopeless(const Ranks& lost) const;  // all have died who could have a part that is not here
  std::string hopeless() const;               // in words, then
  // What comes from now on is not looked at.
  void give_up() { given_up_ = true; }
  bool ended() const { return left_ == 0 || given_up_; }
  ChannelId channel() const { return channel_; }
  Step step() const { return step_; }
  bool is_of(const Pull& pull) const { return pull.channel == channel_ && pull.step == step_; }

 private:
  struct Part {
    int bucket = 0;
    int shard = 0;
    Ranks keepers;          // in the order in which they are asked; not this rank itself, which has missed the update
    std::size_t asked = 0;  // so often somebody was, one after the other
    std::size_t refusals = 0;
    TimeUs asked_at = 0;
    std::byte* place = nullptr;
    std::size_t bytes = 0;
    bool here = false;
  };

  void ask_next(std::size_t part, TimeUs now);
  void arrived(std::size_t part, TimeUs asked_at, const std::vector<std::byte>& data);

  Transport& transport_;
  const SendPull send_pull_;
  const NextTag next_tag_;
  const ChannelId channel_;
  const Step step_;
  std::set<int>& silent_;
  const TimeUs patience_us_;
  std::vector<Part> parts_;
  std::size_t left_ = 0;
  bool given_up_ = false;
  TimeUs last_asked_at_ = 0;  // of those who have answered
  OnFetched on_fetched_;
};

}  // namespace hvd_backup
