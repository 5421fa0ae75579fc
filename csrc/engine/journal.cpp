#include "engine/journal.h"

#include <limits>

namespace hvd_backup {

namespace {
constexpr std::size_t spare_limit = 8;  // two shards of a few buckets: what a step forgets is what the next one keeps
}

void Journal::keep(Step step, int bucket, int shard, std::span<const std::byte> data) {
  std::shared_ptr<std::vector<std::byte>> block;
  for (auto spare = spare_.begin(); spare != spare_.end(); ++spare) {
    if (spare->use_count() == 1 && (*spare)->capacity() >= data.size()) {
      block = std::move(*spare);
      spare_.erase(spare);
      break;
    }
  }
  if (!block) block = std::make_shared<std::vector<std::byte>>();
  block->assign(data.begin(), data.end());
  auto& place = blocks_[{step, bucket, shard}];
  if (place) bytes_ -= place->size();
  place = std::move(block);
  bytes_ += data.size();
}

Journal::Block Journal::find(Step step, int bucket, int shard) const {
  const auto found = blocks_.find({step, bucket, shard});
  return found == blocks_.end() ? nullptr : found->second;
}

void Journal::forget(Step step, int bucket) {
  forget(blocks_.lower_bound({step, bucket, 0}), blocks_.lower_bound({step, bucket + 1, 0}));
}

void Journal::forget_before(Step step) {
  constexpr int least = std::numeric_limits<int>::min();
  forget(blocks_.begin(), blocks_.lower_bound({step, least, least}));
}

void Journal::forget(Blocks::iterator begin, Blocks::iterator end) {
  for (auto block = begin; block != end; block = blocks_.erase(block)) {
    bytes_ -= block->second->size();
    if (spare_.size() < spare_limit) spare_.push_back(std::move(block->second));
  }
}

}  // namespace hvd_backup
