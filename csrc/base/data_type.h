// The element types that a bucket may have. The numeric values are part of the C API (api/hvd_backup.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace hvd_backup {

enum class DataType : std::uint8_t { float16 = 0, bfloat16 = 1, float32 = 2, float64 = 3, int32 = 4, int64 = 5 };

inline constexpr int data_type_count = 6;

constexpr std::size_t size_of(DataType dtype) {
  switch (dtype) {
    case DataType::float16:
    case DataType::bfloat16:
      return 2;
    case DataType::float32:
    case DataType::int32:
      return 4;
    case DataType::float64:
    case DataType::int64:
      return 8;
  }
  return 0;
}

constexpr bool is_integer(DataType dtype) { return dtype == DataType::int32 || dtype == DataType::int64; }

}  // namespace hvd_backup
