#include "engine/fetch.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "collective/partition.h"

namespace hvd_backup {

namespace {
constexpr std::size_t most_refusals = 50;  // of each keeper
}

Fetch::Fetch(Transport& transport, SendPull send_pull, NextTag next_tag, ChannelId channel, const CatchUp& missed,
             const std::vector<Bucket>& buckets, std::set<int>& silent, TimeUs patience_us, OnFetched on_fetched)
    : transport_(transport),
      send_pull_(std::move(send_pull)),
      next_tag_(std::move(next_tag)),
      channel_(channel),
      step_(missed.update.step),
      silent_(silent),
      patience_us_(patience_us),
      on_fetched_(std::move(on_fetched)) {
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
        Part part;
        part.bucket = static_cast<int>(b);
        part.shard = shard;
        for (int next = owner_of(shard), n = 0; n < k; ++n, next = neighbour_of(next, k)) {
          const int keeper = contributors[static_cast<std::size_t>(next)];
          if (keeper != transport.rank()) part.keepers.push_back(keeper);
        }
        std::stable_partition(part.keepers.begin(), part.keepers.end(),
                              [&](int keeper) { return !silent_.contains(keeper); });
        part.place = static_cast<std::byte*>(bucket.result) + cut.begin * size;
        part.bytes = cut.size() * size;
        parts_.push_back(part);
      }
    }
  }
  left_ = parts_.size();
}

void Fetch::start(TimeUs now) {
  last_asked_at_ = now;
  if (left_ == 0) {
    on_fetched_(now);
    return;
  }
  for (std::size_t part = 0; part < parts_.size(); ++part) ask_next(part, now);
}

void Fetch::tick(TimeUs now) {
  for (std::size_t part = 0; part < parts_.size(); ++part) {
    const bool overdue = now - parts_[part].asked_at >= patience_us_;
    const bool more = parts_[part].asked < parts_[part].keepers.size() || parts_[part].refusals > 0;
    if (parts_[part].here || !overdue || !more) continue;
    silent_.insert(parts_[part].keepers[(parts_[part].asked - 1) % parts_[part].keepers.size()]);
    ask_next(part, now);
  }
}

bool Fetch::refused(const Pull& pull, TimeUs now) {
  const auto part = std::find_if(parts_.begin(), parts_.end(), [&](const Part& each) {
    return each.bucket == pull.bucket && each.shard == pull.shard;
  });
  if (part == parts_.end() || part->here) return true;
  if (++part->refusals == most_refusals * part->keepers.size()) return false;
  // All others refuse as long as they have not heard yet that a contributor has stopped.
  if (part->asked < part->keepers.size()) ask_next(static_cast<std::size_t>(part - parts_.begin()), now);
  return true;
}

bool Fetch::is_hopeless(const Ranks& lost) const {
  return std::any_of(parts_.begin(), parts_.end(), [&](const Part& part) {
    return !part.here && std::all_of(part.keepers.begin(), part.keepers.end(), [&](int keeper) {
      return std::find(lost.begin(), lost.end(), keeper) != lost.end();
    });
  });
}

std::string Fetch::hopeless() const {
  return "none of the other contributors keeps update " + std::to_string(step_) + ", which rank " +
         std::to_string(transport_.rank()) + " has missed";
}

void Fetch::ask_next(std::size_t index, TimeUs now) {
  Part& part = parts_[index];
  const int keeper = part.keepers[part.asked++ % part.keepers.size()];
  part.asked_at = now;
  const Tag tag = next_tag_();
  auto data = std::make_shared<std::vector<std::byte>>(part.bytes);
  transport_.start_receive(keeper, tag, *data,
                           [self = shared_from_this(), index, now, data] { self->arrived(index, now, *data); });
  send_pull_(keeper, Pull{channel_, step_, part.bucket, part.shard, tag});
}

void Fetch::arrived(std::size_t index, TimeUs asked_at, const std::vector<std::byte>& data) {
  Part& part = parts_[index];
  if (part.here || given_up_) return;
  part.here = true;
  std::memcpy(part.place, data.data(), data.size());
  last_asked_at_ = std::max(last_asked_at_, asked_at);
  if (--left_ == 0) on_fetched_(last_asked_at_);
}

}  // namespace hvd_backup
