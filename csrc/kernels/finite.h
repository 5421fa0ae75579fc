// Whether a buffer holds only finite numbers: no NaN, no infinity. One pass at the speed of memory, in the thread that
// hands a gradient over (Engine::submit), for channels that leave such gradients out.
#pragma once

#include <cstddef>

#include "base/data_type.h"

namespace hvd_backup {

// `count` elements of `dtype`; integers are always finite.
bool all_finite(DataType dtype, const void* source, std::size_t count);

}  // namespace hvd_backup
