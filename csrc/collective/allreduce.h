// Sum over a given set of ranks: the direct reduce-scatter and allgather, and the one-exchange variant for small sizes.
//
// With k members and M bytes:
//   direct        the buffer is cut into k shards (partition.h). Member i sends shard j of its contribution to member
//                 j; each sums its own shard over all members in rank order, scales it, and sends it to the others.
//                 2 latencies, 2 M (k-1)/k bytes sent by each member: the lower bound of allreduce.
//                 Shards travel in segments (segments.h), so that a segment is summed and sent on while the next one
//                 arrives, and what has arrived is still in the cache when it is summed.
//   one exchange  every member sends all of its contribution to every other, and each sums everything in rank order.
//                 1 latency, M (k-1) bytes: while that is at most small_bytes.
// Rejected: rings and trees. k-1 or log k latencies, and the order of summation depends on who takes part.
//
// Both give the same bits on every member. The contribution is only read, the result only written: they must not
// overlap.
#pragma once

#include <cstddef>
#include <memory>
#include <set>
#include <vector>

#include "base/data_type.h"
#include "collective/staging_pool.h"
#include "kernels/weighted_sum.h"
#include "transport/transport.h"

namespace hvd_backup {

struct AllreduceOptions {
  std::vector<int> members;     // the contributors, ascending, this rank among them
  std::vector<double> weights;  // one for each member
  double scale = 1.0;           // applied in the last pass
  DataType dtype = DataType::float32;
  std::size_t count = 0;  // elements
  const void* contribution = nullptr;
  void* result = nullptr;
  // Used by this collective alone: for contributions to shards, and for shards of the result.
  Tag tag = 0;
  Tag result_tag = 1;
  bool cancellable = false;  // abandon() may be called; the same on all members

  // The same on all members, as are count and dtype. Memory for what arrives, in each running collective: at most
  // max(staging_bytes, 8 KiB (k-1)) in the direct algorithm, small_bytes in one exchange.
  std::size_t small_bytes = std::size_t{256} << 10;
  std::size_t segment_bytes = std::size_t{256} << 10;
  std::size_t staging_bytes = std::size_t{4} << 20;

  // Where that memory comes from and goes back to; must outlive the collective. Null: from the heap each time, which
  // costs page faults.
  StagingPool* staging = nullptr;

  // If given: the squared norms of the part of the buffer that this member sums are added to it, in the same pass. Each
  // element is counted by one member.
  std::shared_ptr<SquaredNorms> norms;
};

// From which members something has not come yet.
struct Missing {
  std::set<int> contributions;
  std::set<int> results;
};

// A collective that has been started. It lives by itself until it has ended.
class RunningAllreduce {
 public:
  virtual ~RunningAllreduce() = default;
  virtual Missing missing() const = 0;
  // `on_done` will not run, and neither buffer is touched any more. The other members must abandon it, too. Not from
  // inside transport.progress().
  virtual void abandon() = 0;
};

// Starts the collective on this member; `on_done` runs inside transport.progress() (or inside this call when there is
// nothing to wait for) once the result is complete here and neither buffer is read by anybody any more.
// Throws UsageError when the options cannot be right.
std::shared_ptr<RunningAllreduce> start_allreduce(Transport& transport, AllreduceOptions options, OnDone on_done);

}  // namespace hvd_backup
