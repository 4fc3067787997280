// out = act(x gate_weight^T) * (x up_weight^T), with the sums of squares of gate, up and out:
//   gate_sumsq[t] = sum_k gate[t, k]^2, where gate = x gate_weight^T rounded to `dtype`; up_sumsq and out_sumsq in the
//   same way
// Products accumulate in float32 along K; gate, up, act(gate) and out are rounded where the separate modules round
// them. Sums are written for every `step`-th row from `phase` on.
#pragma once

#include "gated_activation.h"
#include "types.h"

namespace plop_ext {

// Features of out per tile; `workspace` holds the sums over each tile of each row.
constexpr int64_t kProjectionTile = 128;
constexpr int kProjectionSums = 3;  // of gate, up and out

struct GatedProjectionArgs {
  const void* x;            // [R, K]
  const void* gate_weight;  // [I, K]
  const void* up_weight;    // [I, K]
  void* out;                // [R, I]
  float* workspace;         // [ceil(I / kProjectionTile), kProjectionSums, R]; nullptr without sums
  float* gate_sumsq;        // [ceil((R - phase) / step)], or nullptr
  float* up_sumsq;          // as gate_sumsq
  float* out_sumsq;         // as gate_sumsq
  DType dtype;              // of all tensors but the sums: float16 or bfloat16
  Activation activation;
  int64_t n_rows;       // R
  int64_t in_features;  // K, a multiple of kVector
  int64_t features;     // I, a multiple of kVector
  int64_t step;
  int64_t phase;
};

// Whether `launch_gated_projection` has a kernel for the current device.
bool has_gated_projection();

// Enqueues on `stream` (a cudaStream_t). Returns nullptr, or why that failed.
const char* launch_gated_projection(const GatedProjectionArgs& args, void* stream);

}  // namespace plop_ext
