// The seam between the dispatch (weighted_sum.cpp) and the kernel (weighted_sum_isa.cpp), which is compiled once for
// each instruction set, each time into a namespace of its own. Only those two files and the kernel's test include this.
#pragma once

#include <cstddef>
#include <span>

#include "base/data_type.h"

namespace hvd_backup {

struct SquaredNorms;

// What weighted_sum does, its arguments already checked. `source_count` is at least 1; `norms` may be null.
using WeightedSumKernel = void (*)(DataType dtype, void* destination, const void* const* sources, const double* weights,
                                   std::size_t source_count, double scale, std::size_t count, SquaredNorms* norms);

struct InstructionSet {
  const char* name;
  WeightedSumKernel sum;
};

// Those that this build has and this machine can run, slowest first. Never empty: "baseline" runs everywhere.
std::span<const InstructionSet> instruction_sets();

#define HVD_BACKUP_DECLARE_KERNEL(isa)                                                                           \
  namespace isa {                                                                                                \
  void weighted_sum_kernel(DataType dtype, void* destination, const void* const* sources, const double* weights, \
                           std::size_t source_count, double scale, std::size_t count, SquaredNorms* norms);      \
  }
HVD_BACKUP_DECLARE_KERNEL(baseline)
HVD_BACKUP_DECLARE_KERNEL(avx2)
HVD_BACKUP_DECLARE_KERNEL(avx512)
#undef HVD_BACKUP_DECLARE_KERNEL

}  // namespace hvd_backup
