// What the module _core_testing is made of: each layer's tests register what they need of it.
#pragma once

#include <nanobind/nanobind.h>

namespace hvd_backup {

void register_data_plane(nanobind::module_& module);  // kernels, transport, collective
void register_control(nanobind::module_& module);
void register_gpu_kernels(nanobind::module_& module);
void register_device(nanobind::module_& module);
void register_nccl(nanobind::module_& module);

}  // namespace hvd_backup
