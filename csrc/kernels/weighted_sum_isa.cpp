// The kernel of weighted_sum. Compiled once for each instruction set, with HVD_BACKUP_ISA naming the set and with
//
//   baseline   no flags: whatever every CPU of the architecture has
//   avx2       -mavx2 -mf16c
//   avx512     -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mf16c
//
// and always with -O3 -ffp-contract=off: a fused multiply-add rounds once where a multiply and an add round twice, so
// machines with and without it would disagree. For the same reason a NaN result always has the same bits.
//
// This file may call no inline function of another header: the linker keeps one copy of each for the whole program, and
// that copy could be the one with instructions that the machine lacks. Hence the plain loops and compiler builtins.
#include "kernels/weighted_sum_isa.h"

#include "kernels/weighted_sum.h"

#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace hvd_backup::HVD_BACKUP_ISA {

namespace {

#if defined(__AVX512F__)
constexpr std::size_t vector_bytes = 64;
#elif defined(__AVX2__)
constexpr std::size_t vector_bytes = 32;
#else
constexpr std::size_t vector_bytes = 16;
#endif

template <class Lane>
struct VectorOf {
  typedef Lane type __attribute__((vector_size(vector_bytes)));
};
template <class Lane>
using Vector = typename VectorOf<Lane>::type;

using Floats = Vector<float>;
using Words = Vector<std::uint32_t>;  // as many lanes as Floats
typedef std::uint16_t Halves __attribute__((vector_size(vector_bytes / 2)));

template <class V>
V load_bytes(const void* from) {
  V vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class V>
void store_bytes(void* to, V vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Intrinsics where the compiler makes several instructions of the portable form. narrow: every word is below 2^16.
#if defined(__AVX512F__)
Words widen(Halves halves) { return bits_as<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, bits_as<__m256i>(halves))); }
Halves narrow(Words words) { return bits_as<Halves>(_mm512_maskz_cvtepi32_epi16(0xffff, bits_as<__m512i>(words))); }
#elif defined(__AVX2__)
Words widen(Halves halves) { return bits_as<Words>(_mm256_cvtepu16_epi32(bits_as<__m128i>(halves))); }
Halves narrow(Words words) {
  const __m256i all = bits_as<__m256i>(words);
  return bits_as<Halves>(_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}
#else
Words widen(Halves halves) { return __builtin_convertvector(halves, Words); }
Halves narrow(Words words) { return __builtin_convertvector(words, Halves); }
#endif

// One NaN for all: which operand's payload survives an addition depends on how the compiler ordered the operands.
template <class V, class Lane>
V with_one_nan(V value, Lane nan) {
  return value == value ? value : V{} + nan;
}

// A format says how elements lie in memory (Stored) and in what type they are summed (Lane).

template <class T>
struct Plain {
  using Stored = T;
  using Lane = T;
  static constexpr bool weighted = T(0.5) != T(0);  // floating point
  static Vector<T> load(const T* from) { return load_bytes<Vector<T>>(from); }
  static void store(T* to, Vector<T> value) {
    if constexpr (weighted) value = with_one_nan(value, T(__builtin_nan("")));
    store_bytes(to, value);
  }
};

struct BFloat16 {
  using Stored = std::uint16_t;
  using Lane = float;
  static constexpr bool weighted = true;
  static Floats load(const Stored* from) { return bits_as<Floats>(widen(load_bytes<Halves>(from)) << 16); }
  static void store(Stored* to, Floats value) {
    const Words bits = bits_as<Words>(value);
    const Words nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    store_bytes(to, narrow(value == value ? nearest_even : Words{} + 0x7fc0));
  }
};

struct Float16 {
  using Stored = std::uint16_t;
  using Lane = float;
  static constexpr bool weighted = true;

#if defined(__AVX512F__)
  // The zero-masked forms with a full mask: GCC warns about its own header for the plain ones.
  static Floats load(const Stored* from) { return _mm512_maskz_cvtph_ps(0xffff, load_bytes<__m256i>(from)); }
  static void store(Stored* to, Floats value) {
    value = with_one_nan(value, __builtin_nanf(""));
    store_bytes(to, _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__F16C__)
  static Floats load(const Stored* from) { return _mm256_cvtph_ps(load_bytes<__m128i>(from)); }
  static void store(Stored* to, Floats value) {
    value = with_one_nan(value, __builtin_nanf(""));
    store_bytes(to, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static Floats load(const Stored* from) {
    const Words half = widen(load_bytes<Halves>(from));
    const Words sign = (half & 0x8000) << 16;
    const Words magnitude = (half & 0x7fff) << 13;  // exponent and fraction where float32 has them
    const Words exponent = magnitude & 0x0f800000;
    // The exponent is rebiased from 15 to 127; infinity and NaN go to the top exponent of float32.
    const Words rebiased = magnitude + (112u << 23);
    const Words special = magnitude + (224u << 23);
    // A subnormal is fraction * 2^-24: as the fraction of a float32 with exponent 2^-14 it is exact after the 2^-14 is
    // taken off again.
    const Floats subnormal = bits_as<Floats>(magnitude + (113u << 23)) - 0x1p-14f;
    const Words bits = exponent == 0 ? bits_as<Words>(subnormal) : exponent == 0x0f800000 ? special : rebiased;
    return bits_as<Floats>(bits | sign);
  }
  static void store(Stored* to, Floats value) {
    const Words bits = bits_as<Words>(value);
    const Words sign = (bits >> 16) & 0x8000;
    const Words magnitude = bits & 0x7fffffff;
    // Normal: rebias from 127 to 15, round the 13 bits that fall away to even; a carry into the exponent is right, also
    // when it makes infinity.
    const Words odd = (magnitude >> 13) & 1;
    const Words normal = (magnitude - (112u << 23) + 0xfff + odd) >> 13;
    // Below 2^-14: adding 0.5 leaves the multiple of 2^-24 in the lowest bits, rounded to even by the adder.
    const Words subnormal = bits_as<Words>(bits_as<Floats>(magnitude) + 0.5f) - 0x3f000000;
    const Words finite = magnitude < (113u << 23) ? subnormal : normal;
    // From 65520 = 65504 + half a unit upwards: infinity.
    const Words rounded = magnitude >= 0x477ff000 ? Words{} + 0x7c00 : finite;
    store_bytes(to, narrow(value == value ? (rounded | sign) : Words{} + 0x7e00));
  }
#endif
};

template <class Format>
struct Sum {
  using Stored = typename Format::Stored;
  using Lane = typename Format::Lane;
  using V = Vector<Lane>;

  static constexpr std::size_t lanes = sizeof(V) / sizeof(Lane);
  static constexpr std::size_t tile_vectors = 4;  // independent sums, so that loads and adds overlap
  // More sources than this are more streams than the CPU can prefetch: they are summed a group at a time, block by
  // block, with the partial sums of a block in the first-level cache.
  static constexpr std::size_t group_size = 16;
  static constexpr std::size_t block = 2048;

  // A group of consecutive sources, and what comes before and after it.
  struct Group {
    const Stored* sources[group_size];
    Lane weights[group_size];
    std::size_t size;
    bool unit;            // all weights are 1
    const Lane* carried;  // sums of the groups before, from the start of the block; null for the first group
    Lane* partial;        // where the sums go when more groups follow; null for the last group
  };

  // Squared norms of a block, lane by lane; the lanes are added up in float64, block by block.
  struct Norms {
    V sources;
    V destination;
  };

  Stored* destination;
  Lane scale;

  // Elements [offset, offset + n * lanes), n vectors at once. Everything is read before anything is written, because
  // the destination may be one of the sources.
  template <std::size_t n, bool unit, bool measured>
  void vectors(const Group& group, std::size_t base, std::size_t offset, Norms* norms) const {
    V sums[n];
    V squares{};
    std::size_t first = 0;
    if (group.carried != nullptr) {
      for (std::size_t u = 0; u < n; ++u) sums[u] = load_bytes<V>(group.carried + offset + u * lanes);
    } else {
      for (std::size_t u = 0; u < n; ++u) sums[u] = term<unit, measured>(group, 0, base + offset + u * lanes, squares);
      first = 1;
    }
    for (std::size_t i = first; i < group.size; ++i) {
      for (std::size_t u = 0; u < n; ++u) sums[u] += term<unit, measured>(group, i, base + offset + u * lanes, squares);
    }
    if constexpr (measured) norms->sources += squares;
    if (group.partial != nullptr) {
      for (std::size_t u = 0; u < n; ++u) store_bytes(group.partial + offset + u * lanes, sums[u]);
      return;
    }
    for (std::size_t u = 0; u < n; ++u) {
      const V value = scaled(sums[u]);
      if constexpr (measured) norms->destination += value * value;
      Format::store(destination + base + offset + u * lanes, value);
    }
  }

  template <bool unit, bool measured>
  static V term(const Group& group, std::size_t source, std::size_t element, V& squares) {
    const V value = Format::load(group.sources[source] + element);
    if constexpr (measured) squares += value * value;
    if constexpr (unit) return value;
    return value * group.weights[source];
  }

  V scaled(V sum) const {
    if constexpr (Format::weighted) return scale == Lane(1) ? sum : sum * scale;
    return sum;
  }

  // Adds up elements [base, base + count) of the group's sources.
  template <bool unit, bool measured>
  void elements(const Group& group, std::size_t base, std::size_t count, Norms* norms) const {
    std::size_t offset = 0;
    for (; offset + tile_vectors * lanes <= count; offset += tile_vectors * lanes) {
      vectors<tile_vectors, unit, measured>(group, base, offset, norms);
    }
    for (; offset + lanes <= count; offset += lanes) vectors<1, unit, measured>(group, base, offset, norms);
    if (offset < count) tail<unit, measured>(group, base, offset, count - offset, norms);
  }

  // The last, incomplete vector: the same vector arithmetic on copies filled up with zeros.
  template <bool unit, bool measured>
  void tail(const Group& group, std::size_t base, std::size_t offset, std::size_t count, Norms* norms) const {
    Stored padded[group_size][lanes] = {};
    Lane carried[lanes] = {};
    Lane partial[lanes];
    Stored out[lanes];
    Group copy = group;
    for (std::size_t i = 0; i < group.size; ++i) {
      __builtin_memcpy(padded[i], group.sources[i] + base + offset, count * sizeof(Stored));
      copy.sources[i] = padded[i];
    }
    if (group.carried != nullptr) {
      __builtin_memcpy(carried, group.carried + offset, count * sizeof(Lane));
      copy.carried = carried;
    }
    if (group.partial != nullptr) copy.partial = partial;
    Sum{out, scale}.template vectors<1, unit, measured>(copy, 0, 0, norms);
    if (group.partial != nullptr) {
      __builtin_memcpy(group.partial + offset, partial, count * sizeof(Lane));
    } else {
      __builtin_memcpy(destination + base + offset, out, count * sizeof(Stored));
    }
  }

  template <bool measured>
  void run(const void* const* sources, const double* weights, std::size_t source_count, std::size_t count,
           SquaredNorms* norms) const {
    Lane partial[block];
    const bool at_once = source_count <= group_size && !measured;
    const std::size_t step = at_once ? count : block;
    for (std::size_t base = 0; base < count; base += step) {
      const std::size_t length = count - base < step ? count - base : step;
      Norms of_block{};
      for (std::size_t first = 0; first < source_count; first += group_size) {
        Group group;
        group.size = source_count - first < group_size ? source_count - first : group_size;
        group.unit = true;
        for (std::size_t i = 0; i < group.size; ++i) {
          group.sources[i] = static_cast<const Stored*>(sources[first + i]);
          group.weights[i] = static_cast<Lane>(weights[first + i]);
          group.unit = group.unit && weights[first + i] == 1.0;
        }
        group.carried = first == 0 ? nullptr : partial;
        group.partial = first + group.size < source_count ? partial : nullptr;
        if constexpr (Format::weighted) {
          group.unit ? elements<true, measured>(group, base, length, &of_block)
                     : elements<false, measured>(group, base, length, &of_block);
        } else {
          elements<true, false>(group, base, length, nullptr);
        }
      }
      if constexpr (measured) {
        for (std::size_t lane = 0; lane < lanes; ++lane) {
          norms->sources += static_cast<double>(of_block.sources[lane]);
          norms->destination += static_cast<double>(of_block.destination[lane]);
        }
      }
    }
  }
};

template <class Format>
void sum(void* destination, const void* const* sources, const double* weights, std::size_t source_count, double scale,
         std::size_t count, SquaredNorms* norms) {
  const Sum<Format> job{static_cast<typename Format::Stored*>(destination), static_cast<typename Format::Lane>(scale)};
  if constexpr (Format::weighted) {
    if (norms != nullptr) return job.template run<true>(sources, weights, source_count, count, norms);
  }
  job.template run<false>(sources, weights, source_count, count, nullptr);
}

}  // namespace

void weighted_sum_kernel(DataType dtype, void* destination, const void* const* sources, const double* weights,
                         std::size_t source_count, double scale, std::size_t count, SquaredNorms* norms) {
  switch (dtype) {
    case DataType::float16:
      return sum<Float16>(destination, sources, weights, source_count, scale, count, norms);
    case DataType::bfloat16:
      return sum<BFloat16>(destination, sources, weights, source_count, scale, count, norms);
    case DataType::float32:
      return sum<Plain<float>>(destination, sources, weights, source_count, scale, count, norms);
    case DataType::float64:
      return sum<Plain<double>>(destination, sources, weights, source_count, scale, count, norms);
    case DataType::int32:  // unsigned: the same bits, and overflow is defined
      return sum<Plain<std::uint32_t>>(destination, sources, weights, source_count, scale, count, norms);
    case DataType::int64:
      return sum<Plain<std::uint64_t>>(destination, sources, weights, source_count, scale, count, norms);
  }
}

}  // namespace hvd_backup::HVD_BACKUP_ISA
