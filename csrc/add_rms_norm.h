// RMSNorm of hidden = residual + x, with the sums of squares of x and of normed:
//   y      = x, or with an inner weight rms_norm(x; inner_weight, inner_eps)      (blocks that normalize before they
//   add) hidden = residual + y, or without a residual y normed = rms_norm(hidden; weight, eps) x_sumsq[t] = sum_k (x[t,
//   k] - bias[k])^2,  normed_sumsq[t] = sum_k normed[t, k]^2
// Roundings are those of the modules that the op replaces: y, hidden and normed are rounded to `dtype`; a plain norm
// rounds h * rstd before it multiplies by the weight, one with `unit_offset` multiplies h * rstd * (1 + weight) in
// float32. Sums are written for every `step`-th row from `phase` on.
#pragma once

#include "types.h"

namespace plop_ext {

// Widest row that the CUDA kernel holds in registers; the fake checks the same (MAX_NORM_FEATURES).
constexpr int64_t kMaxNormFeatures = 16384;

struct AddRmsNormArgs {
  const void* x;             // [R, K]
  const void* residual;      // [R, K] or nullptr
  const void* inner_weight;  // [K] or nullptr
  const void* weight;        // [K]
  const void* bias;          // [K] or nullptr
  void* hidden;              // [R, K] or nullptr: not stored
  void* normed;              // [R, K]
  float* x_sumsq;            // [ceil((R - phase) / step)], or nullptr
  float* normed_sumsq;       // as x_sumsq
  DType dtype;               // of all tensors but the sums; not float64
  int64_t n_rows;            // R
  int64_t in_features;       // K, a multiple of kVector, at most kMaxNormFeatures
  float inner_eps;
  float eps;
  bool unit_offset;  // the weights are stored as their distance from 1
  int64_t step;
  int64_t phase;
};

// Computes rows [begin, end) on the calling thread.
void add_rms_norm_cpu(const AddRmsNormArgs& args, int64_t begin, int64_t end);

// Enqueues on `stream` (a cudaStream_t). Returns nullptr, or CUDA's text for a failed launch.
const char* launch_add_rms_norm(const AddRmsNormArgs& args, void* stream);

}  // namespace plop_ext
