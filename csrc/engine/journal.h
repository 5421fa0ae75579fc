// The reduced shards of the last updates, kept for late ranks. With k contributors, contributor i keeps shard i and
// its neighbour's, shard i-1, of each bucket: 2 M/k bytes an update, and one stopped keeper blocks nobody. When one
// stops before it has its shards, the others keep all, so that another one may stop, too. Bounded by the coordinator,
// which decides no update that the journals could not hold (max_lag).
//
// They lie in host memory, or, if they were summed on a GPU, in page-locked memory or on the GPU (device_work.h).
#pragma once

#include <atomic>
#include <cstddef>
#include <map>
#include <memory>
#include <span>
#include <tuple>
#include <vector>

#include "control/messages.h"

namespace hvd_backup {

class Journal {
 public:
  struct Block {
    std::shared_ptr<std::byte> data;  // null: there is none
    std::size_t bytes = 0;
    bool on_device = false;
  };

  // Copies the shard. A block that is still on its way to somebody stays alive until it has arrived.
  void keep(Step step, int bucket, int shard, std::span<const std::byte> data);
  // Copies nothing.
  void keep(Step step, int bucket, int shard, Block block);

  // None when it is not here.
  Block find(Step step, int bucket, int shard) const;

  // What was kept of it has not become the update.
  void forget(Step step, int bucket);

  // Every rank has the updates before `step`: nobody will ask for them.
  void forget_before(Step step);

  std::size_t bytes() const { return bytes_; }  // from any thread

 private:
  using Key = std::tuple<Step, int, int>;
  using Memory = std::shared_ptr<std::vector<std::byte>>;
  struct Kept {
    Block block;
    Memory memory;  // the block's, unless it came from elsewhere
  };
  using Blocks = std::map<Key, Kept>;

  void put(const Key& key, Kept kept);
  void forget(Blocks::iterator begin, Blocks::iterator end);

  Blocks blocks_;
  std::vector<Memory> spare_;  // memory to use again; fresh pages are slow
  std::atomic<std::size_t> bytes_ = 0;
};

// The index among k contributors of who keeps `shard` first (its owner), and of the neighbour who keeps it too.
inline int owner_of(int shard) { return shard; }
inline int neighbour_of(int shard, int contributors) { return (shard + 1) % contributors; }

}  // namespace hvd_backup
