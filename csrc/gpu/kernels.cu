// The launches. What a thread does is in move.h and sum.h.
#include "gpu/kernels.h"

#include "gpu/cuda_handle.h"
#include "gpu/elements.h"
#include "gpu/launch.h"
#include "gpu/move.h"
#include "gpu/sum.h"

namespace hvd_backup::gpu {

namespace {

__device__ void add_to(Tally* all, Tally mine) {
  constexpr unsigned everybody = 0xffffffff;
  for (int distance = 16; distance > 0; distance /= 2) {
    mine.squares += __shfl_down_sync(everybody, mine.squares, distance);
    mine.nonfinite |= __shfl_down_sync(everybody, mine.nonfinite, distance);
  }
  if (threadIdx.x % 32 != 0) return;
  if (mine.squares != 0) atomicAdd(&all->squares, mine.squares);
  if (mine.nonfinite != 0) atomicOr(&all->nonfinite, 1u);
}

template <class Job>
__global__ void __launch_bounds__(threads_per_block)
    move_kernel(const __grid_constant__ Pieces pieces, typename Job::Element* bucket, double scale, std::uint64_t from,
                Tally* all) {
  Tally mine{};
  Job{scale, &mine}.move_tile(pieces, bucket, from + Job::tile * blockIdx.x, threadIdx.x);
  if constexpr (Job::is_measured) add_to(all, mine);
}

template <class Format>
__global__ void __launch_bounds__(threads_per_block)
    sum_kernel(const __grid_constant__ Sources sources, typename Format::Stored* destination,
               typename Format::Lane scale, bool wide, std::uint64_t count) {
  Sum<Format>{scale, wide}.sum_tile(sources, destination, Sum<Format>::tile * blockIdx.x, count, threadIdx.x);
}

// On a stream.
struct CudaLauncher {
  cudaStream_t stream;

  template <class Job>
  void move(const Pieces& pieces, void* bucket, double scale, TileRange tiles, Tally* tally) const {
    move_kernel<Job><<<tiles.count, threads_per_block, 0, stream>>>(pieces, static_cast<typename Job::Element*>(bucket),
                                                                    scale, tiles.from, tally);
    check(cudaGetLastError(), "moving gradients");
  }

  template <class Format>
  void sum(const Sources& sources, void* destination, double scale, bool wide, std::uint64_t count,
           unsigned blocks) const {
    sum_kernel<Format>
        <<<blocks, threads_per_block, 0, stream>>>(sources, static_cast<typename Format::Stored*>(destination),
                                                   static_cast<typename Format::Lane>(scale), wide, count);
    check(cudaGetLastError(), "summing");
  }
};

}  // namespace

void pack(DataType gradient, DataType wire, std::span<const Piece> pieces, void* bucket, double scale, Stream stream,
          Tally* tally) {
  const OnDevice here(stream.device);
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  if (tally != nullptr) check(cudaMemsetAsync(tally, 0, sizeof *tally, handle), "clearing a tally");
  launch_pack(CudaLauncher{handle}, gradient, wire, pieces, bucket, scale, tally);
}

void unpack(DataType gradient, DataType wire, std::span<const Piece> pieces, void* bucket, double scale,
            Stream stream) {
  const OnDevice here(stream.device);
  launch_unpack(CudaLauncher{static_cast<cudaStream_t>(stream.handle)}, gradient, wire, pieces, bucket, scale);
}

void sum(DataType dtype, void* destination, std::span<const void* const> sources, std::span<const double> weights,
         double scale, std::size_t count, Stream stream) {
  const OnDevice here(stream.device);
  launch_sum(CudaLauncher{static_cast<cudaStream_t>(stream.handle)}, dtype, destination, sources, weights, scale,
             count);
}

}  // namespace hvd_backup::gpu
