// Memory for what arrives and is summed at once. Kept between collectives: fresh memory costs a page fault for every
// 4 KiB, more time than to fill it.
#pragma once

#include <cstddef>
#include <memory>

#include "base/block_pool.h"

namespace hvd_backup {

class StagingPool : public BlockPool<std::unique_ptr<std::byte[]>> {
 public:
  Block take(std::size_t size) {
    return BlockPool::take(size, [](std::size_t bytes) { return std::make_unique_for_overwrite<std::byte[]>(bytes); });
  }
};

}  // namespace hvd_backup
