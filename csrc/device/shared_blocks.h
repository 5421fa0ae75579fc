// Blocks of a GPU's memory, each with an owner or several, and in use again when the last one goes: Device::memory().
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

  Memory take(std::size_t bytes) {
    auto block = std::make_shared<Block>(pool_.take(bytes, allocate_));
    std::byte* const data = block->data.get();
    return {data, [pool = shared_from_this(), block](std::byte*) { pool->pool_.give_back(std::move(*block)); }};
  }

 private:
  using Block = BlockPool<Memory>::Block;

  const Allocate allocate_;
  BlockPool<Memory> pool_;
};

}  // namespace hvd_backup
