// The module hvd_backup._core_testing: the inner layers of the core, opened to the tests. Not part of an installation.
#include "bindings/testing.h"

NB_MODULE(_core_testing, module) {
  hvd_backup::register_data_plane(module);
  hvd_backup::register_control(module);
  hvd_backup::register_gpu_kernels(module);
  hvd_backup::register_device(module);
  hvd_backup::register_nccl(module);
}
