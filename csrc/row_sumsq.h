// out[r] = sum_k (x[r, k] - bias[k])^2 for every `step`-th row of x; with one bias per inner row, bias[r % inner, k].
// A row's result is a function of its values, K and the dtype alone, never of strides, alignment or the other rows:
// each element belongs to a fixed accumulator, and accumulators are added in a fixed order.
#pragma once

#include "types.h"

namespace plop_ext {

struct RowSumsqArgs {
  const void* x;     // [outer, inner, K] elements of `dtype`
  const void* bias;  // [K] or [inner, K] of `bias_dtype`, or nullptr
  void* out;         // [n_rows], float32 (float64 if x is float64)
  DType dtype;
  DType bias_dtype;
  int64_t n_rows;          // rows written: ceil((outer * inner - phase) / step)
  int64_t inner;           // rows per outer index; outer * inner rows in all
  int64_t in_features;     // K
  int64_t outer_stride;    // in elements
  int64_t row_stride;      // in elements
  int64_t feature_stride;  // in elements; 1 allows vectorized loads
  int64_t bias_stride;     // in elements; 0 for one bias for all rows, K for one per inner row
  int64_t step;            // distance in rows between the rows read
  int64_t phase;           // first row read
};

// Two tensors of one dtype, `n_rows`, step, phase and device.
struct RowSumsqPair {
  RowSumsqArgs parts[2];  // the first without a bias
};

// Computes rows [begin, end) of the output on the calling thread.
void row_sumsq_cpu(const RowSumsqArgs& args, int64_t begin, int64_t end);

// Enqueues on `stream` (a cudaStream_t). Returns nullptr, or CUDA's text for a failed launch.
const char* launch_row_sumsq(const RowSumsqArgs& args, void* stream);

// The same for two tensors, bitwise identical to two calls. On CUDA it is one launch where both tensors take the kernel
// that has a warp per row and aligned loads, and one launch is faster (`enqueue_pair`).
void row_sumsq_pair_cpu(const RowSumsqPair& pair, int64_t begin, int64_t end);
const char* launch_row_sumsq_pair(const RowSumsqPair& pair, void* stream);

}  // namespace plop_ext
