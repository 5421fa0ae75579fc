// Sum over a given set of ranks whose data lie on GPUs that exchange data directly (device/device.h): the direct
// reduce-scatter and allgather of allreduce.h, to the same bits, all of it on the GPU: one exchange brings the other
// members' contributions to this member's shard, one kernel sums them in rank order, one exchange brings the others'
// sums. Late ranks take no part.
//
// Rejected: NCCL's own allreduce over all ranks, which late ranks would join with zeros. One that is stopped would hold
// up all others, at any time; and the bits would depend on who takes part.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "base/data_type.h"
#include "base/squared_norms.h"
#include "collective/partition.h"
#include "device/device.h"

namespace hvd_backup {

struct DeviceAllreduceOptions {
  std::vector<int> members;     // their numbers in the group, ascending, at least two
  std::size_t self = 0;         // index among the members
  std::vector<double> weights;  // one for each member
  double scale = 1.0;
  DataType dtype = DataType::float32;  // floating point
  std::size_t count = 0;               // elements
  // On the GPU.
  const void* contribution = nullptr;
  void* result = nullptr;
  // Parts of the result that are copied elsewhere, too, before it is complete.
  struct Kept {
    Shard part;
    std::shared_ptr<std::byte> place;
    bool on_device = false;  // otherwise in host memory
  };
  std::vector<Kept> kept;
  // If given: the squared norms of this member's shard are added to it, in the same pass, before it is complete.
  std::shared_ptr<SquaredNorms> norms;
};

// One collective. It does not begin by itself: to be asked to go on, again and again, and in the group's order, the
// next one only when this one is `issued`.
class DeviceAllreduce {
 public:
  // ready: when the contribution is there, and the result may be written.
  DeviceAllreduce(Device& device, DeviceGroup& group, DeviceAllreduceOptions options, Device::Ready ready);

  // Puts into the queue what can be. Returns whether there was anything.
  bool go_on();
  bool issued() const { return stage_ == Stage::issued; }  // nothing is left to be put into the queue
  bool complete();

 private:
  enum class Stage { fresh, gathering, scattering, issued };

  Shard shard(std::size_t member) const { return shard_of(options_.count, options_.members.size(), member); }
  std::size_t slot_bytes() const;
  void exchange_contributions();
  void sum();
  void exchange_results();
  void finish();

  Device& device_;
  DeviceGroup& group_;
  const DeviceAllreduceOptions options_;
  const Device::Ready ready_;
  const std::size_t element_bytes_;
  Stage stage_ = Stage::fresh;
  std::byte* scratch_ = nullptr;
  Device::Norms norms_;  // until they are added
  Device::Mark end_ = 0;
};

}  // namespace hvd_backup
