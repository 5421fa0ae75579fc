// Blocks of memory on a GPU, or that one knows, each with an owner or several, and in use again when the last one goes.
// The pool lives as long as one of its blocks.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <utility>

#include "base/block_pool.h"

namespace hvd_backup {

class SharedBlocks : public std::enable_shared_from_this<SharedBlocks> {
 public:
  using Memory = std::shared_ptr<std::byte>;
  using Allocate = std::function<Memory(std::size_t bytes)>;

  explicit SharedBlocks(Allocate allocate) : allocate_(std::move(allocate)) {}

  Memory take(std::size_t bytes) { return shared(pool_.take(bytes, allocate_)); }
  // Null: none of those that were given back is large enough.
  Memory take_again(std::size_t bytes) { return shared(pool_.take_again(bytes)); }

 private:
  using Block = BlockPool<Memory>::Block;

  Memory shared(Block block) {
    if (!block.data) return nullptr;
    std::byte* const data = block.data.get();
    return {data, [pool = shared_from_this(), owned = std::make_shared<Block>(std::move(block))](std::byte*) {
              pool->pool_.give_back(std::move(*owned));
            }};
  }

  const Allocate allocate_;
  BlockPool<Memory> pool_;
};

}  // namespace hvd_backup
