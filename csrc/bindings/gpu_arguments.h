// What Python gives to the GPU library, in its terms: for the library's own module and for the one of the tests.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/data_type.h"
#include "base/error.h"
#include "gpu/launch.h"

namespace hvd_backup::gpu {

using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline DataType data_type(std::string_view name) {
  constexpr std::string_view names[] = {"float16", "bfloat16", "float32", "float64", "int32", "int64"};
  const auto* found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names)) throw UsageError("unknown dtype " + std::string(name));
  return static_cast<DataType>(found - names);
}

// gradients: their addresses, 0 for none.
inline std::vector<Piece> pieces(const std::vector<Address>& gradients, const std::vector<std::uint64_t>& begins,
                                 const std::vector<std::uint64_t>& counts) {
  if (gradients.size() != begins.size() || gradients.size() != counts.size()) {
    throw UsageError("gradients, begins and counts must be of one length");
  }
  std::vector<Piece> made;
  std::uint64_t end = 0;
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    if (begins[i] < end) throw UsageError("the gradients of a bucket must be given in their order, without overlap");
    end = begins[i] + counts[i];
    made.push_back({pointer(gradients[i]), begins[i], counts[i]});
  }
  return made;
}

inline std::vector<const void*> pointers(const std::vector<Address>& addresses) {
  std::vector<const void*> made;
  for (const Address address : addresses) made.push_back(pointer(address));
  return made;
}

}  // namespace hvd_backup::gpu
