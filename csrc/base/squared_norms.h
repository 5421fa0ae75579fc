// What a sum of gradients is measured by, on the CPU (kernels/weighted_sum.h) and on a GPU (device/device.h).
#pragma once

namespace hvd_backup {

struct SquaredNorms {
  double sources = 0;      // summed over the sources, before weights
  double destination = 0;  // after weights and scale
};

}  // namespace hvd_backup
