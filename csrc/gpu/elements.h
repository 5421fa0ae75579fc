// How elements lie in memory and what is computed with them, on a GPU as on the CPU. The GPU kernels are plain
// functions of one thread (move.h, sum.h) over these formats, so that the tests run them without a GPU, compiled by any
// C++ compiler; only the conversions of float16 take another way there, to the same bits.
//
// As on the CPU (kernels/weighted_sum.h): float16, bfloat16 and float32 are computed with in float32, rounded once, to
// nearest even, and every NaN comes out as the same one. Nothing here may be contracted to fused multiply-adds.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define HVD_BACKUP_EVERYWHERE __host__ __device__
#else
#define HVD_BACKUP_EVERYWHERE
#endif

namespace hvd_backup::gpu {

template <class To, class From>
HVD_BACKUP_EVERYWHERE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

struct Float32 {
  using Stored = float;
  using Lane = float;
  HVD_BACKUP_EVERYWHERE static Lane load(Stored stored) { return stored; }
  HVD_BACKUP_EVERYWHERE static Stored store(Lane value) {
    return value == value ? value : bits_as<float>(std::uint32_t{0x7fc00000});
  }
};

struct Float64 {
  using Stored = double;
  using Lane = double;
  HVD_BACKUP_EVERYWHERE static Lane load(Stored stored) { return stored; }
  HVD_BACKUP_EVERYWHERE static Stored store(Lane value) {
    return value == value ? value : bits_as<double>(std::uint64_t{0x7ff8000000000000});
  }
};

struct BFloat16 {
  using Stored = std::uint16_t;
  using Lane = float;
  HVD_BACKUP_EVERYWHERE static Lane load(Stored stored) { return bits_as<float>(std::uint32_t{stored} << 16); }
  HVD_BACKUP_EVERYWHERE static Stored store(Lane value) {
    if (value != value) return 0x7fc0;
    const auto bits = bits_as<std::uint32_t>(value);
    return static_cast<Stored>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

struct Float16 {
  using Stored = std::uint16_t;
  using Lane = float;
#if defined(__CUDA_ARCH__)
  __device__ static Lane load(Stored stored) { return __half2float(__ushort_as_half(stored)); }
  __device__ static Stored store(Lane value) {
    return value == value ? __half_as_ushort(__float2half_rn(value)) : Stored{0x7e00};
  }
#else
  HVD_BACKUP_EVERYWHERE static Lane load(Stored stored) {
    const std::uint32_t sign = std::uint32_t{stored & 0x8000u} << 16;
    const std::uint32_t magnitude = std::uint32_t{stored & 0x7fffu} << 13;
    const std::uint32_t exponent = magnitude & 0x0f800000;
    if (exponent == 0) {  // fraction * 2^-24
      const float value = bits_as<float>(magnitude + (113u << 23)) - 0x1p-14f;
      return bits_as<float>(bits_as<std::uint32_t>(value) | sign);
    }
    return bits_as<float>((magnitude + ((exponent == 0x0f800000 ? 224u : 112u) << 23)) | sign);
  }
  HVD_BACKUP_EVERYWHERE static Stored store(Lane value) {
    if (value != value) return 0x7e00;
    const auto bits = bits_as<std::uint32_t>(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000;
    const std::uint32_t magnitude = bits & 0x7fffffff;
    std::uint32_t rounded = 0x7c00;  // infinity, from 65504 + half a unit upwards
    if (magnitude < (113u << 23)) {  // adding 0.5 leaves the multiple of 2^-24 in the lowest bits
      rounded = bits_as<std::uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000;
    } else if (magnitude < 0x477ff000) {
      rounded = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    return static_cast<Stored>(rounded | sign);
  }
#endif
};

// What is loaded and stored at once by one thread: `size` elements, in accesses of up to 16 bytes.
template <class Stored, int size>
struct alignas(sizeof(Stored) * size < 16 ? sizeof(Stored) * size : 16) Vector {
  Stored element[size];
};

template <class V>
HVD_BACKUP_EVERYWHERE bool is_aligned_for(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % alignof(V) == 0;
}

}  // namespace hvd_backup::gpu
