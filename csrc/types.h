// What the checks and the kernels agree on: element types, vectors, and the rows that are read. No torch.
#pragma once

#include <cstdint>

namespace plop_ext {

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Elements that the fused ops read and write as one vector; their fakes check sizes, strides and offsets by the same
// number (VECTOR in plop_ext/ops/_schema.py).
constexpr int kVector = 8;
// Bytes of a vectorized access on CUDA, and the alignment that it needs.
constexpr int kVectorBytes = 16;

// Number of rows among `rows` that start at `phase` and lie `step` apart.
constexpr int64_t rows_read(int64_t rows, int64_t step, int64_t phase) {
  return rows > phase ? (rows - phase - 1) / step + 1 : 0;
}

}  // namespace plop_ext
