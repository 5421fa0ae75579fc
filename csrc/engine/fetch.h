// Fetches one missed update from the journals of its contributors, shard by shard. Pulled, never pushed: only this
// rank waits. A keeper that does not answer in time is not waited for: its neighbour keeps the same shard and is
// asked as well; whoever is first wins. Every request has a buffer of its own, so a late answer can't touch anything.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include "base/clock.h"
#include "control/member.h"
#include "engine/channel.h"
#include "transport/transport.h"

namespace hvd_backup {

class Fetch : public std::enable_shared_from_this<Fetch> {
 public:
  using SendPull = std::function<void(int keeper, const Pull& pull)>;
  using NextTag = std::function<std::int32_t()>;

  // patience_us: how long to wait for a keeper before its neighbour is asked too (measured by the caller).
  Fetch(Transport& transport, SendPull send_pull, NextTag next_tag, ChannelId channel, const CatchUp& missed,
        const std::vector<Bucket>& buckets, TimeUs now, TimeUs patience_us, OnDone on_done);

  void start();
  void tick(TimeUs now);
  bool complete() const { return left_ == 0; }

 private:
  struct Part {
    int bucket = 0;
    int shard = 0;
    int keeper = 0;
    int neighbour = 0;  // equal to keeper when there is none
    std::byte* place = nullptr;
    std::size_t bytes = 0;
    bool here = false;
  };

  void ask(std::size_t part, int keeper);
  void arrived(std::size_t part, const std::vector<std::byte>& data);

  Transport& transport_;
  const SendPull send_pull_;
  const NextTag next_tag_;
  const ChannelId channel_;
  const Step step_;
  const TimeUs began_;
  const TimeUs patience_us_;
  bool asked_neighbours_ = false;
  std::vector<Part> parts_;
  std::size_t left_ = 0;
  OnDone on_done_;
};

}  // namespace hvd_backup
