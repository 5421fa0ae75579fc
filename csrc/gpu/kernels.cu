// The launches. What a thread does is in move.h and sum.h.
#include "gpu/kernels.h"

#include "gpu/cuda_handle.h"
#include "gpu/elements.h"
#include "gpu/launch.h"
#include "gpu/move.h"
#include "gpu/sum.h"

namespace hvd_backup::gpu {

namespace {

constexpr unsigned everybody = 0xffffffff;

__device__ void add_to(Tally* all, Tally mine) {
  for (int distance = 16; distance > 0; distance /= 2) {
    mine.squares += __shfl_down_sync(everybody, mine.squares, distance);
    mine.nonfinite |= __shfl_down_sync(everybody, mine.nonfinite, distance);
  }
  if (threadIdx.x % 32 != 0) return;
  if (mine.squares != 0) atomicAdd(&all->squares, mine.squares);
  if (mine.nonfinite != 0) atomicOr(&all->nonfinite, 1u);
}

__device__ void add_to(SquaredNorms* all, SquaredNorms mine) {
  for (int distance = 16; distance > 0; distance /= 2) {
    mine.sources += __shfl_down_sync(everybody, mine.sources, distance);
    mine.destination += __shfl_down_sync(everybody, mine.destination, distance);
  }
  if (threadIdx.x % 32 != 0) return;
  atomicAdd(&all->sources, mine.sources);
  atomicAdd(&all->destination, mine.destination);
}

template <class Job>
__global__ void __launch_bounds__(threads_per_block)
    move_kernel(const __grid_constant__ Pieces pieces, typename Job::Element* bucket, double scale, std::uint64_t from,
                Tally* all) {
  Tally mine{};
  Job{scale, &mine}.move_tile(pieces, bucket, from + Job::tile * blockIdx.x, threadIdx.x);
  if constexpr (Job::is_measured) add_to(all, mine);
}

template <class Job>
__global__ void __launch_bounds__(threads_per_block)
    sum_kernel(const __grid_constant__ Sources sources, typename Job::Element* destination, typename Job::Lane scale,
               bool wide, std::uint64_t count, SquaredNorms* all) {
  SquaredNorms mine;
  Job{scale, wide, &mine}.sum_tile(sources, destination, Job::tile * blockIdx.x, count, threadIdx.x);
  if constexpr (Job::is_measured) add_to(all, mine);
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

  template <class Job>
  void sum(const Sources& sources, void* destination, double scale, bool wide, std::uint64_t count, unsigned blocks,
           SquaredNorms* norms) const {
    sum_kernel<Job><<<blocks, threads_per_block, 0, stream>>>(sources, static_cast<typename Job::Element*>(destination),
                                                              static_cast<typename Job::Lane>(scale), wide, count,
                                                              norms);
    check(cudaGetLastError(), "summing");
  }
};

// Launches nothing: the kernel is on the device from now on.
struct Loader {
  template <class Job>
  void move(const Pieces&, void*, double, TileRange, Tally*) const {
    load(reinterpret_cast<const void*>(&move_kernel<Job>));
  }

  template <class Job>
  void sum(const Sources&, void*, double, bool, std::uint64_t, unsigned, SquaredNorms*) const {
    load(reinterpret_cast<const void*>(&sum_kernel<Job>));
  }

 private:
  static void load(const void* kernel) {
    cudaFuncAttributes unused;
    check(cudaFuncGetAttributes(&unused, kernel), "loading kernels");
  }
};

}  // namespace

void load_all() {
  const Piece piece{nullptr, 0, 1};
  const void* const source = nullptr;
  const double weight = 1.0;
  Tally tally{};
  SquaredNorms norms;
  constexpr DataType dtypes[] = {DataType::float16, DataType::bfloat16, DataType::float32, DataType::float64};
  for (const DataType gradient : dtypes) {
    launch_sum(Loader{}, gradient, nullptr, {&source, 1}, {&weight, 1}, 1.0, 1, nullptr);
    launch_sum(Loader{}, gradient, nullptr, {&source, 1}, {&weight, 1}, 1.0, 1, &norms);
    for (const DataType wire : dtypes) {
      if (!can_cast(gradient, wire)) continue;
      launch_pack(Loader{}, gradient, wire, {&piece, 1}, nullptr, 1.0, nullptr);
      launch_pack(Loader{}, gradient, wire, {&piece, 1}, nullptr, 1.0, &tally);
      launch_unpack(Loader{}, gradient, wire, {&piece, 1}, nullptr, 1.0);
    }
  }
}

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
         double scale, std::size_t count, Stream stream, SquaredNorms* norms) {
  const OnDevice here(stream.device);
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  if (norms != nullptr) check(cudaMemsetAsync(norms, 0, sizeof *norms, handle), "clearing squared norms");
  launch_sum(CudaLauncher{handle}, dtype, destination, sources, weights, scale, count, norms);
}

void try_on(int device) {
  const OnDevice here(device);
  const OwnStream stream;
  const HostMemory<float> memory(1);
  const Piece zero{nullptr, 0, 1};
  pack(DataType::float32, DataType::float32, {&zero, 1}, memory.get().data(), 1.0, Stream{device, stream.get()},
       nullptr);
  check(cudaStreamSynchronize(stream.get()), "running a kernel");
}

}  // namespace hvd_backup::gpu
