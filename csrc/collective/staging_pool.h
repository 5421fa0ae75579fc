// Memory for what arrives and is summed at once. Kept between collectives: fresh memory costs a page fault for every
// 4 KiB, more time than to fill it. Holds at most as much as was ever in use at the same time. Used by one thread.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

namespace hvd_backup {

class StagingPool {
 public:
  struct Block {
    std::unique_ptr<std::byte[]> data;
    std::size_t size = 0;
  };

  // At least `size` bytes, contents undefined.
  Block take(std::size_t size) {
    for (std::size_t i = blocks_.size(); i > 0; --i) {  // the one that came back last is most likely in the cache
      Block& block = blocks_[i - 1];
      if (block.size < size) continue;
      Block found = std::exchange(block, {});
      blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i - 1));
      return found;
    }
    if (!blocks_.empty()) blocks_.pop_back();  // too small: replaced by the new one
    return {std::make_unique_for_overwrite<std::byte[]>(size), size};
  }

  void give_back(Block block) { blocks_.push_back(std::move(block)); }

 private:
  std::vector<Block> blocks_;
};

}  // namespace hvd_backup
