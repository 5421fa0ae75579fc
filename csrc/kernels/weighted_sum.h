// The one arithmetic kernel of the collective: destination[e] = scale * sum_i weights[i] * sources[i][e].
//
// The sum runs over i ascending, for each element on its own, in float32 for float16, bfloat16 and float32, in float64
// for float64, and exactly (modulo 2^32 or 2^64) for integers. So the bits depend on the order of the sources alone:
// not on alignment, on how a buffer is cut into pieces, on the instruction set of the machine, or on what the calling
// thread has been told to make of denormal numbers (PyTorch lets the user choose, TensorFlow chooses for its threads).
// float16 and bfloat16 are rounded once, to nearest even.
#pragma once

#include <cstddef>
#include <span>

#include "base/data_type.h"
#include "base/squared_norms.h"

namespace hvd_backup {

// Each source and the destination hold `count` elements of `dtype`. The destination may be one of the sources, and may
// not overlap one in part. Integers: every weight and the scale must be 1 (UsageError otherwise).
//
// norms: if given, the squared norms of this piece are added to it in the same pass; the sum is the same bit for bit.
// They are sums of float32 squares by blocks, so of about six digits. Not for integers (UsageError).
void weighted_sum(DataType dtype, void* destination, std::span<const void* const> sources,
                  std::span<const double> weights, double scale, std::size_t count, SquaredNorms* norms = nullptr);

// The instruction set that weighted_sum has chosen on this machine: "baseline", "avx2" or "avx512".
const char* kernel_instruction_set();

}  // namespace hvd_backup
