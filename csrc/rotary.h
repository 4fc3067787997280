// Rotary position embedding of queries and keys, after an RMSNorm over each head where the model has one, with the sums
// of squares of q and k:
//   x_sumsq[t] = sum_{h, d} (x[t, h, d] - bias[h, d])^2                                for x = q and x = k
//   n[h]       = x[h], or rms_norm(x[h]; weight, eps) over the head
//   out[d]     = n[d] * cos[d] - n[d + R/2] * sin[d]                                       for d < R/2
//   out[d]     = n[d] * cos[d] + n[d - R/2] * sin[d]                                       for R/2 <= d < R
//   out[d]     = n[d]                                                                      for d >= R
// Every product and every sum is rounded to `dtype`, as separate PyTorch operators do.
// Sums are written for every `step`-th token from `phase` on.
#pragma once

#include "types.h"

namespace plop_ext {

// Widest head; the fake checks the same (MAX_HEAD_DIM).
constexpr int64_t kMaxHeadDim = 256;
// Features of one lane: two vectors, which rotate into each other. The rotated and the other part of a head are made of
// whole units.
constexpr int64_t kRotaryUnit = 2 * kVector;

struct RotaryHeads {
  const void* x;       // [B * T, heads, D], tokens `stride` apart
  const void* weight;  // [D] or nullptr: no norm
  const void* bias;    // [heads, D] or nullptr
  void* out;           // [B * T, heads, D]
  float* sumsq;        // [ceil((B * T - phase) / step)], or nullptr
  int64_t heads;
  int64_t stride;
};

struct RotaryArgs {
  RotaryHeads q;
  RotaryHeads k;
  const void* cos;     // [B * T, R] or [T, R]
  const void* sin;     // as cos
  DType dtype;         // of all tensors but the sums; not float64
  int64_t n_rows;      // B * T
  int64_t cos_rows;    // token t reads cos row t % cos_rows: T for one table for all samples, else B * T
  int64_t head_dim;    // D, at most kMaxHeadDim; with a norm kRotaryUnit times a power of two
  int64_t rotary_dim;  // R <= D, a multiple of kRotaryUnit; so is D - R
  float eps;
  bool unit_offset;  // the weights are stored as their distance from 1
  int64_t step;
  int64_t phase;
};

// Computes tokens [begin, end) on the calling thread.
void rotary_cpu(const RotaryArgs& args, int64_t begin, int64_t end);

// Enqueues on `stream` (a cudaStream_t). Returns nullptr, or CUDA's text for a failed launch.
const char* launch_rotary(const RotaryArgs& args, void* stream);

}  // namespace plop_ext
