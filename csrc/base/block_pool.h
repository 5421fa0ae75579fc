// Memory that is kept to be used again, because to get it anew is slow. Holds at most as many blocks as were ever in
// use at the same time. Used by one thread.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

namespace hvd_backup {

// Memory: what owns the memory of a block.
template <class Memory>
class BlockPool {
 public:
  struct Block {
    Memory data{};
    std::size_t size = 0;
  };

  // At least `size` bytes, contents undefined; otherwise from allocate(size).
  template <class Allocate>
  Block take(std::size_t size, Allocate allocate) {
    Block found = take_again(size);
    if (found.data) return found;
    if (!blocks_.empty()) blocks_.pop_back();  // too small: replaced by the new one
    return {allocate(size), size};
  }

  // Empty: there is none of that size.
  Block take_again(std::size_t size) {
    for (std::size_t i = blocks_.size(); i > 0; --i) {  // the one that came back last is most likely in the cache
      Block& block = blocks_[i - 1];
      if (block.size < size) continue;
      Block found = std::exchange(block, {});
      blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i - 1));
      return found;
    }
    return {};
  }

  void give_back(Block block) { blocks_.push_back(std::move(block)); }

 private:
  std::vector<Block> blocks_;
};

}  // namespace hvd_backup
