// What the GPU library does: one launch each, on a stream of the caller, who does not wait for it. Every address is one
// that the GPU can use, and must stay valid until the stream has come past the launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/data_type.h"
#include "base/squared_norms.h"

namespace hvd_backup::gpu {

struct Piece;
struct Tally;

// A cudaStream_t, and the device that it belongs to.
struct Stream {
  int device;
  void* handle;
};

// Which dtypes: those that can_cast (launch.h) says: equal ones, float32 to float16 and bfloat16, float64 to float16
// and float32.
//
// bucket[piece.begin + i] = scale * piece.gradient[i] for all pieces, cast to `wire`; zeros where there is no gradient.
// A gradient may lie in its very place in the bucket.
//
// tally: if given, the squared norm of what has been written, and whether it holds a NaN or an infinity.
void pack(DataType gradient, DataType wire, std::span<const Piece> pieces, void* bucket, double scale, Stream stream,
          Tally* tally);

// piece.gradient[i] = scale * bucket[piece.begin + i], cast to `gradient`.
void unpack(DataType gradient, DataType wire, std::span<const Piece> pieces, void* bucket, double scale, Stream stream);

// destination[e] = scale * sum_i weights[i] * sources[i][e], summed in that order, to the same bits as weighted_sum.
// The destination may be one of the sources. Floating point only; 1 to sources_at_once sources.
//
// norms: if given, on the GPU: the squared norms, of the destination as it is stored. Added up in float64, in an order
// that differs from run to run.
void sum(DataType dtype, void* destination, std::span<const void* const> sources, std::span<const double> weights,
         double scale, std::size_t count, Stream stream, SquaredNorms* norms);

// Whether kernels run on this GPU: throws if not. Waits for one.
void try_on(int device);

// Onto the calling thread's current device. Otherwise CUDA loads each kernel when it is launched first, and may wait
// for all that runs to do so: for an exchange, say, that waits for another rank.
void load_all();

}  // namespace hvd_backup::gpu
