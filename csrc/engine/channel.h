// The engine's side of one channel: the Member (who decides nothing, but knows what to do next), the buffers that the
// training thread has handed over, the reductions that are running, and the journal. Owned by the Engine and guarded
// by its mutex.
#pragma once

#include <condition_variable>
#include <map>
#include <string>
#include <vector>

#include "base/data_type.h"
#include "control/member.h"
#include "engine/journal.h"

namespace hvd_backup {

struct BucketLayout {
  std::size_t count = 0;  // elements
  DataType dtype = DataType::float32;
  int scope = 0;
};

struct Bucket {
  BucketLayout layout;
  const void* contribution = nullptr;
  void* result = nullptr;
  bool submitted = false;  // in the current step
  std::size_t bytes() const { return layout.count * size_of(layout.dtype); }
};

// One decision to which this rank contributes, bucket by bucket as they are handed over.
struct Reduction {
  Decision decision;
  std::vector<bool> started;      // by bucket
  int running = 0;                // collectives of this attempt that have not ended
  int left = 0;                   // buckets that are not complete
  Squares squares;                // of what this rank has summed
  std::vector<int> retired_tags;  // of attempts that were given up, while something may still arrive for them
};

struct Channel {
  Channel(std::string channel_name, int rank, ChannelKind kind, bool arrive_first, bool takes_average)
      : name(std::move(channel_name)), average(takes_average), member(rank, kind, arrive_first) {}

  const std::string name;
  const bool average;
  bool measured = false;     // the coordinator wants the squared norms of gradients
  int gradient_buckets = 0;  // the first so many buckets hold gradients
  Member member;
  bool opened = false;
  bool dirty = false;  // has something for the engine thread
  ChannelId id = 0;
  std::string proposal;
  std::string failure;
  std::vector<Bucket> buckets;
  std::map<int, Reduction> reductions;  // by scope
  int running = 0;                      // collectives and fetches that use the buffers
  Journal journal;                      // used by the engine thread alone
  std::condition_variable changed;
};

}  // namespace hvd_backup
