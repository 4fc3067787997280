// Element types the kernels read. Shared by the torch-facing glue and the torch-free kernels.
#pragma once

#include <cstdint>

namespace plop_ext {

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

}  // namespace plop_ext
