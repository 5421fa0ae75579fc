#include "engine/fetch.h"

#include <cstring>

#include "collective/partition.h"

namespace hvd_backup {

Fetch::Fetch(Transport& transport, SendPull send_pull, NextTag next_tag, ChannelId channel, const CatchUp& missed,
             const std::vector<Bucket>& buckets, TimeUs now, TimeUs patience_us, OnDone on_done)
    : transport_(transport),
      send_pull_(std::move(send_pull)),
      next_tag_(std::move(next_tag)),
      channel_(channel),
      step_(missed.update.step),
      began_(now),
      patience_us_(patience_us),
      on_done_(std::move(on_done)) {
  for (const int scope : missed.scopes) {
    const Ranks& contributors = missed.update.contributors[static_cast<std::size_t>(scope)];
    const int k = static_cast<int>(contributors.size());
    for (std::size_t b = 0; b < buckets.size(); ++b) {
      const Bucket& bucket = buckets[b];
      if (bucket.layout.scope != scope) continue;
      if (bucket.result == nullptr)
        throw UsageError("no result buffer is known for a missed update: call set_results()");
      const std::size_t size = size_of(bucket.layout.dtype);
      for (int shard = 0; shard < k; ++shard) {
        const Shard cut = shard_of(bucket.layout.count, static_cast<std::size_t>(k), static_cast<std::size_t>(shard));
        if (cut.size() == 0) continue;
        parts_.push_back({static_cast<int>(b), shard, contributors[static_cast<std::size_t>(owner_of(shard))],
                          contributors[static_cast<std::size_t>(neighbour_of(shard, k))],
                          static_cast<std::byte*>(bucket.result) + cut.begin * size, cut.size() * size, false});
      }
    }
  }
  left_ = parts_.size();
}

void Fetch::start() {
  if (left_ == 0) {
    on_done_();
    return;
  }
  for (std::size_t part = 0; part < parts_.size(); ++part) ask(part, parts_[part].keeper);
}

void Fetch::tick(TimeUs now) {
  if (asked_neighbours_ || now - began_ < patience_us_) return;
  asked_neighbours_ = true;
  for (std::size_t part = 0; part < parts_.size(); ++part) {
    if (!parts_[part].here && parts_[part].neighbour != parts_[part].keeper) ask(part, parts_[part].neighbour);
  }
}

void Fetch::ask(std::size_t index, int keeper) {
  const Part& part = parts_[index];
  const std::int32_t tag = next_tag_();
  auto data = std::make_shared<std::vector<std::byte>>(part.bytes);
  transport_.start_receive(keeper, tag, *data,
                           [self = shared_from_this(), index, data] { self->arrived(index, *data); });
  send_pull_(keeper, Pull{channel_, step_, part.bucket, part.shard, tag});
}

void Fetch::arrived(std::size_t index, const std::vector<std::byte>& data) {
  Part& part = parts_[index];
  if (part.here) return;
  part.here = true;
  std::memcpy(part.place, data.data(), data.size());
  if (--left_ == 0) on_done_();
}

}  // namespace hvd_backup
