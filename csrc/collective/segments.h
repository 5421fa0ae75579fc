// How the direct algorithm cuts its shards into segments, which is how large the memory for arriving data gets. Pure,
// and the same on every member: nobody tells anybody.
#pragma once

#include <algorithm>
#include <cstddef>

#include "collective/partition.h"

namespace hvd_backup {

// Segments of this member's shard that may be arriving at the same time: one arrives while the other is summed.
inline constexpr std::size_t staging_slots = 2;

inline constexpr std::size_t min_segment_bytes = std::size_t{4} << 10;

// Elements in a segment, a multiple of shard_granule: `segment_bytes`, or less when segments of that size from all
// `members` would not fit into `staging_bytes`.
inline std::size_t segment_elements(std::size_t members, std::size_t element_bytes, std::size_t segment_bytes,
                                    std::size_t staging_bytes) {
  const std::size_t arriving = staging_slots * std::max<std::size_t>(members - 1, 1);
  const std::size_t bytes = std::max(min_segment_bytes, std::min(segment_bytes, staging_bytes / arriving));
  return std::max<std::size_t>(bytes / element_bytes / shard_granule, 1) * shard_granule;
}

inline std::size_t segment_count(Shard shard, std::size_t segment) { return (shard.size() + segment - 1) / segment; }

inline Shard segment_of(Shard shard, std::size_t segment, std::size_t index) {
  const std::size_t begin = shard.begin + index * segment;
  return {begin, std::min(begin + segment, shard.end)};
}

}  // namespace hvd_backup
