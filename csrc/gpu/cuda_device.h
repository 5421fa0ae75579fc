// A GPU as the engine uses it, with CUDA and NCCL.
#pragma once

#include <cstddef>
#include <memory>

#include "device/device.h"
#include "gpu/nccl.h"

namespace hvd_backup::gpu {

// What is given to its calls must be memory that this GPU can use; host memory is page-locked (pinned), or copy() would
// wait for the copies. The device must outlive its groups. sum() takes 1 to sources_at_once (sum.h) sources.
std::unique_ptr<Device> make_cuda_device(int device, std::shared_ptr<const Nccl> nccl);

// Such host memory, with whatever lies in it. To take it or to give it back may wait for the GPU.
std::shared_ptr<std::byte> page_locked_memory(int device, std::size_t bytes);

}  // namespace hvd_backup::gpu
