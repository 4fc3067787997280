// out = act(gate) * up, with the sums of squares of its inputs and its output (SwiGLU, GeGLU):
//   gate_sumsq[t] = sum_k (gate[t, k] - gate_bias[k])^2, up_sumsq in the same way, out_sumsq[t] = sum_k out[t, k]^2
// act(gate) is computed in float32 and rounded to `dtype`, then the product is: the roundings of two modules.
// Sums are written for every `step`-th row from `phase` on.
#pragma once

#include "types.h"

namespace plop_ext {

enum class Activation : int32_t { kSilu, kGeluTanh };

struct GatedActivationArgs {
  const void* gate;       // [R, I], rows `gate_stride` apart
  const void* up;         // [R, I], rows `up_stride` apart
  const void* gate_bias;  // [I] or nullptr
  const void* up_bias;    // [I] or nullptr
  void* out;              // [R, I]
  float* gate_sumsq;      // [ceil((R - phase) / step)], or nullptr
  float* up_sumsq;        // as gate_sumsq
  float* out_sumsq;       // as gate_sumsq
  DType dtype;            // of all tensors but the sums; not float64
  Activation activation;
  int64_t n_rows;    // R
  int64_t features;  // I, a multiple of kVector
  int64_t gate_stride;
  int64_t up_stride;
  int64_t step;
  int64_t phase;
};

// Computes rows [begin, end) on the calling thread.
void gated_activation_cpu(const GatedActivationArgs& args, int64_t begin, int64_t end);

// Enqueues on `stream` (a cudaStream_t). Returns nullptr, or CUDA's text for a failed launch.
const char* launch_gated_activation(const GatedActivationArgs& args, void* stream);

}  // namespace plop_ext
