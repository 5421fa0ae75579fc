#include "engine/journal.h"

#include <limits>

namespace hvd_backup {

namespace {
constexpr std::size_t spare_limit = 8;  // two shards of a few buckets: what a step forgets is what the next one keeps
}

void Journal::keep(Step step, int bucket, int shard, std::span<const std::byte> data) {
  Memory memory;
  for (auto spare = spare_.begin(); spare != spare_.end(); ++spare) {
    if (spare->use_count() == 1 && (*spare)->capacity() >= data.size()) {
      memory = std::move(*spare);
      spare_.erase(spare);
      break;
    }
  }
  if (!memory) memory = std::make_shared<std::vector<std::byte>>();
  memory->assign(data.begin(), data.end());
  const Block block{{memory, memory->data()}, data.size(), false};
  put({step, bucket, shard}, {block, std::move(memory)});
}

void Journal::keep(Step step, int bucket, int shard, Block block) {
  put({step, bucket, shard}, {std::move(block), nullptr});
}

void Journal::put(const Key& key, Kept kept) {
  Kept& place = blocks_[key];
  bytes_ -= place.block.bytes;
  bytes_ += kept.block.bytes;
  place = std::move(kept);
}

Journal::Block Journal::find(Step step, int bucket, int shard) const {
  const auto found = blocks_.find({step, bucket, shard});
  return found == blocks_.end() ? Block{} : found->second.block;
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
    Kept& kept = block->second;
    bytes_ -= kept.block.bytes;
    kept.block = {};
    if (kept.memory && spare_.size() < spare_limit) spare_.push_back(std::move(kept.memory));
  }
}

}  // namespace hvd_backup
