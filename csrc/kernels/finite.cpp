// A number is NaN or infinite exactly if all bits of its exponent are set. Adding 1 to the exponent then carries into
// the sign's place, which was masked off before: an AND, an ADD and an OR for each vector, which every x86-64 and ARM
// has for words of 16, 32 and 64 bits. So there is nothing that wider instructions would make faster than memory is,
// and no variants for them (see weighted_sum_isa.h).
#include "kernels/finite.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace hvd_backup {

namespace {

constexpr std::size_t block_bytes = 16'384;  // after each the pass may end: a NaN is mostly one of many

// Word: unsigned, as wide as an element. fraction_bits: below the exponent.
template <class Word, int fraction_bits>
bool words_finite(const void* source, std::size_t count) {
  constexpr int bits = 8 * static_cast<int>(sizeof(Word));
  constexpr Word one = Word(Word(1) << fraction_bits);
  constexpr Word sign = Word(Word(1) << (bits - 1));
  constexpr Word exponent = Word(sign - one);
  constexpr std::size_t block = block_bytes / sizeof(Word);
  const auto* bytes = static_cast<const std::byte*>(source);
  for (std::size_t begin = 0; begin < count; begin += block) {
    const std::size_t end = std::min(begin + block, count);
    Word carried = 0;
    for (std::size_t i = begin; i < end; ++i) {
      Word word;
      std::memcpy(&word, bytes + i * sizeof(Word), sizeof word);
      carried = Word(carried | Word((word & exponent) + one));
    }
    if ((carried & sign) != 0) return false;
  }
  return true;
}

}  // namespace

bool all_finite(DataType dtype, const void* source, std::size_t count) {
  switch (dtype) {
    case DataType::float16:
      return words_finite<std::uint16_t, 10>(source, count);
    case DataType::bfloat16:
      return words_finite<std::uint16_t, 7>(source, count);
    case DataType::float32:
      return words_finite<std::uint32_t, 23>(source, count);
    case DataType::float64:
      return words_finite<std::uint64_t, 52>(source, count);
    case DataType::int32:
    case DataType::int64:
      return true;
  }
  return true;
}

}  // namespace hvd_backup
