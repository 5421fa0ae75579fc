// How a buffer of `count` elements is cut into `parts` shards: shard p covers [begin, end) elements, shards follow each
// other, cover everything, differ by at most one granule, and begin on a multiple of `shard_granule` elements
// (or at count). Pure arithmetic in 64 bits. The journal and catch-up use the same cut.
#pragma once

#include <algorithm>
#include <cstddef>

namespace hvd_backup {

inline constexpr std::size_t shard_granule = 16;  // one cache line of float32

struct Shard {
  std::size_t begin = 0;
  std::size_t end = 0;
  std::size_t size() const { return end - begin; }
};

inline Shard shard_of(std::size_t count, std::size_t parts, std::size_t part) {
  const std::size_t granules = (count + shard_granule - 1) / shard_granule;
  const std::size_t base = granules / parts;
  const std::size_t extra = granules % parts;  // the first `extra` shards get one granule more
  const auto edge = [&](std::size_t p) { return (p * base + std::min(p, extra)) * shard_granule; };
  return {std::min(edge(part), count), std::min(edge(part + 1), count)};
}

}  // namespace hvd_backup
