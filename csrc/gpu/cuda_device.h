// A GPU as the engine uses it, with CUDA and NCCL.
#pragma once

#include <memory>

#include "device/device.h"
#include "gpu/nccl.h"

namespace hvd_backup::gpu {

// What is given to its calls must be memory that this GPU can use; host memory is page-locked (pinned), or copy() would
// wait for the copies. The device must outlive its groups. sum() takes 1 to sources_at_once (sum.h) sources.
std::unique_ptr<Device> make_cuda_device(int device, std::shared_ptr<const Nccl> nccl);

}  // namespace hvd_backup::gpu
