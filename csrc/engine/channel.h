// The engine's side of one channel: the Member (who decides nothing, but knows what to do next), the buffers that the
// training thread has handed over, the reductions that are running, and the journal. Owned by the Engine and guarded
// by its mutex.
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/data_type.h"
#include "collective/allreduce.h"
#include "control/member.h"
#include "device/device.h"
#include "engine/journal.h"
#include "engine/state.h"

namespace hvd_backup {

struct BucketLayout {
  std::size_t count = 0;  // elements
  DataType dtype = DataType::float32;
  int scope = 0;
  bool on_device = false;
};

// Where a bucket lies on the GPU.
struct OnDevice {
  const void* contribution = nullptr;
  void* result = nullptr;
  bool finite = true;  // holds neither NaN nor infinity, with drop_nonfinite
  Device::Ready ready;
};

struct Bucket {
  BucketLayout layout;
  // In host memory. For a bucket on the GPU they are what it goes through, and where missed updates come.
  const void* contribution = nullptr;
  void* result = nullptr;
  bool submitted = false;  // in the current step
  std::optional<OnDevice> on_device;
  std::size_t bytes() const { return layout.count * size_of(layout.dtype); }
};

// By bucket and shard: where its GPU puts what is kept; none: there was no place, so it goes through the result in host
// memory.
using Places = std::map<std::pair<int, int>, Journal::Block>;

// One attempt to which this rank contributes, bucket by bucket as they are handed over.
struct Reduction {
  Decision decision;
  std::vector<bool> started;                                   // by bucket
  std::vector<std::shared_ptr<RunningAllreduce>> collectives;  // of those
  int running = 0;                                             // collectives that have not ended
  int left = 0;                                                // buckets that are not complete
  Squares squares;                                             // of what this rank has summed
  bool keeps_all = false;                                      // a contributor has stopped: all shards are kept here
  Places places;
};

struct Channel {
  Channel(std::string channel_name, int rank, ChannelKind kind, bool arrive_first, bool takes_average)
      : name(std::move(channel_name)), average(takes_average), member(rank, kind, arrive_first) {}

  const std::string name;
  const bool average;
  bool drop_nonfinite = false;
  bool resyncs = false;      // beyond the journal this rank takes over another one's state
  bool measured = false;     // the coordinator wants the squared norms of gradients
  int gradient_buckets = 0;  // the first so many buckets hold gradients
  Member member;
  bool opened = false;
  bool dirty = false;  // has something for the engine thread
  ChannelId id = 0;
  std::string proposal;
  std::string failure;
  std::vector<Bucket> buckets;
  std::map<int, Reduction> reductions;                   // by scope
  int running = 0;                                       // collectives and fetches that use the buffers
  Journal journal;                                       // used by the engine thread alone
  std::map<Step, std::shared_ptr<const State>> offered;  // copies of this rank's state, by step
  std::shared_ptr<const State> arrived;                  // another one's
  std::shared_ptr<const State> taken_over;               // the same, once it was told, until the next wait
  bool asked_elsewhere = false;  // a thread that waits for another channel was told that this one's state is wanted
  std::condition_variable changed;
};

}  // namespace hvd_backup
