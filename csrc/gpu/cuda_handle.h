// The owners of CUDA's objects, and the one place where its error codes become exceptions.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "base/error.h"

namespace hvd_backup::gpu {

inline void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would be blamed for it
  throw RuntimeFailure(std::string("CUDA: ") + doing + ": " + cudaGetErrorString(status));
}

// A device is the calling thread's current one, until the end of the scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    check(cudaSetDevice(device), "choosing a device");
  }
  ~OnDevice() {
    if (is_used(before_)) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  // In a thread that has never chosen one, the device before is GPU 0. To go back there would take some hundred MB of
  // it (a context), for each rank of the machine: so to a device that this process does not use we do not go back.
  static bool is_used(int device) {
    using GetState = int (*)(int device, unsigned* flags, int* active);
    static const auto get_state =
        reinterpret_cast<GetState>(dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuDevicePrimaryCtxGetState"));
    unsigned flags = 0;
    int active = 0;
    return get_state == nullptr || get_state(device, &flags, &active) != 0 || active != 0;
  }

  int before_ = 0;
};

// A stream that does not wait for the default stream, nor that for it, and whose kernels go before others.
class OwnStream {
 public:
  OwnStream() {
    int lowest = 0, highest = 0;
    check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "asking for the priorities of streams");
    check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, highest), "making a stream");
  }
  ~OwnStream() { cudaStreamDestroy(stream_); }  // what is in it still runs
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;

  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "making an event"); }
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }

  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

// Host memory that the GPU writes to by itself (page-locked). To take some or to give it back may wait for the GPU.
template <class T>
class HostMemory {
 public:
  explicit HostMemory(std::size_t count) : count_(count) {
    void* data = nullptr;
    check(cudaHostAlloc(&data, count * sizeof(T), cudaHostAllocDefault), "taking page-locked memory");
    data_ = static_cast<T*>(data);
  }
  ~HostMemory() {
    if (data_ != nullptr) cudaFreeHost(data_);
  }
  HostMemory(HostMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), count_(other.count_) {}
  HostMemory& operator=(HostMemory&&) = delete;

  std::span<T> get() const { return {data_, count_}; }

 private:
  T* data_ = nullptr;
  std::size_t count_;
};

// Memory that is taken and given back in the order of a stream, so that nothing has to wait for that: other than with
// cudaFree, which would wait for an exchange that never ends. What is given back is kept for the next one: the device's
// usual pool would give it to the system whenever the program waits for its GPU, in each step, say.
class StreamPool {
 public:
  StreamPool(int device, cudaStream_t stream) : stream_(stream) {
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    check(cudaMemPoolCreate(&pool_, &properties), "making a memory pool");
    std::uint64_t everything = UINT64_MAX;
    check(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &everything), "keeping memory");
  }
  ~StreamPool() { cudaMemPoolDestroy(pool_); }  // what is taken stays
  StreamPool(const StreamPool&) = delete;
  StreamPool& operator=(const StreamPool&) = delete;

  cudaError_t take(void** data, std::size_t bytes) const {
    return cudaMallocFromPoolAsync(data, bytes, pool_, stream_);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  cudaStream_t stream_;
  cudaMemPool_t pool_ = nullptr;
};

// One piece of it.
class StreamMemory {
 public:
  explicit StreamMemory(const StreamPool& pool) : pool_(pool) {}
  ~StreamMemory() {
    if (data_ != nullptr) cudaFreeAsync(data_, pool_.stream());
  }
  StreamMemory(const StreamMemory&) = delete;
  StreamMemory& operator=(const StreamMemory&) = delete;

  // At least so many bytes, with whatever lies in them.
  void* at_least(std::size_t bytes) {
    if (bytes <= size_) return data_;
    size_ = 0;
    if (data_ != nullptr) check(cudaFreeAsync(std::exchange(data_, nullptr), pool_.stream()), "giving memory back");
    check(pool_.take(&data_, bytes), "taking memory");
    size_ = bytes;
    return data_;
  }

 private:
  const StreamPool& pool_;
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

// The same, in blocks with an owner each, all gone before the stream. Null: no memory is left.
inline std::shared_ptr<std::byte> stream_memory(int device, const StreamPool& pool, std::size_t bytes) {
  void* data = nullptr;
  const cudaError_t status = pool.take(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // or the next launch would be blamed for it
    return nullptr;
  }
  check(status, "taking memory");
  return {static_cast<std::byte*>(data), [device, stream = pool.stream()](std::byte* memory) {
            try {
              const OnDevice here(device);
              cudaFreeAsync(memory, stream);
            } catch (const RuntimeFailure&) {
              // CUDA has ended before: so has the memory.
            }
          }};
}

// Memory of which other libraries and processes may be told: those that share it between processes (CUDA IPC) do not
// know what belongs to a stream. To free it waits for all that the GPU does.
inline std::shared_ptr<std::byte> shareable_memory(int device, std::size_t bytes) {
  const OnDevice here(device);
  void* data = nullptr;
  check(cudaMalloc(&data, bytes), "taking memory");
  return {static_cast<std::byte*>(data), [device](std::byte* memory) {
            try {
              const OnDevice here(device);
              cudaFree(memory);
            } catch (const RuntimeFailure&) {
              // CUDA has ended before: so has the memory.
            }
          }};
}

}  // namespace hvd_backup::gpu
