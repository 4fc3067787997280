// SiLU and GELU.
#pragma once

#include "../gated_activation.h"

namespace plop_ext {

// 1 / d for d in [1, 2], to one unit in the last place: an IEEE division takes a branch and twice the instructions.
__device__ __forceinline__ float reciprocal(float d) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  return r;
}

// 2^x to two units in the last place, zero below the normal numbers.
__device__ __forceinline__ float power_of_two(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// In float32 the expressions of PyTorch's kernels. A 16-bit result does not show a float32's last bits, so silu can
// take half of the instructions there: at the clock that matrix products leave, instructions bind. It divides by at
// most 2, does not overflow to zero below -88.7, and uses the root of exp(-|x|), which stays a normal number for
// longer.
template <typename T, Activation kActivation>
__device__ __forceinline__ float activated(float x) {
  if constexpr (kActivation == Activation::kGeluTanh) {
    constexpr float kBeta = 0.7978845608028654f;  // sqrt(2 / pi)
    constexpr float kKappa = 0.044715f;
    const float cube = x * x * x;
    const float inner = kBeta * (x + kKappa * cube);
    return 0.5f * x * (1.0f + tanhf(inner));
  } else if constexpr (sizeof(T) == 2) {
    constexpr float kHalfLog2E = 0.7213475204444817f;
    const float root = power_of_two(-kHalfLog2E * fabsf(x));
    const float value = x * reciprocal(fmaf(root, root, 1.0f));
    return x < 0.0f ? value * root * root : value;
  } else {
    return x / (1.0f + expf(-x));
  }
}

}  // namespace plop_ext
