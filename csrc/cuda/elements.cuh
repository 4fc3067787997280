// Chunks of neighbouring elements in registers: vectorized loads and stores, widening, sums of squares, and arithmetic
// that rounds as PyTorch's operators do.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../types.h"

namespace plop_ext {

__device__ __forceinline__ float load_value(float v) { return v; }
__device__ __forceinline__ double load_value(double v) { return v; }
__device__ __forceinline__ float load_value(__half v) { return __half2float(v); }
__device__ __forceinline__ float load_value(__nv_bfloat16 v) { return __bfloat162float(v); }

// The `j`-th of elements that lie in registers, widened. A bfloat16 is the upper half of its float32: a shift or a mask
// of the word it lies in. The compiler takes two instructions for the upper one.
template <typename T>
__device__ __forceinline__ auto element(const T* __restrict__ values, int j) {
  return load_value(values[j]);
}
template <>
__device__ __forceinline__ auto element(const __nv_bfloat16* __restrict__ values, int j) {
  const uint32_t word = reinterpret_cast<const uint32_t*>(values)[j / 2];
  return __uint_as_float(j % 2 == 0 ? word << 16 : word & 0xffff0000u);
}

// Neighbouring elements in registers. A thread of a fused kernel handles chunks of the default size: one vectorized
// access of a 16-bit type, two of float32.
template <typename T, int kSize = kVector>
struct alignas(kVectorBytes) Chunk {
  T values[kSize];

  __device__ __forceinline__ auto operator[](int j) const { return element(values, j); }
};

// Loads through the read-only path.
template <int kSize = kVector, typename T>
__device__ __forceinline__ Chunk<T, kSize> load_chunk(const T* __restrict__ p) {
  constexpr int kLoads = kSize * sizeof(T) / kVectorBytes;
  Chunk<T, kSize> chunk;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    reinterpret_cast<uint4*>(&chunk)[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
  }
  return chunk;
}

template <typename T, int kSize>
__device__ __forceinline__ void store_chunk(T* __restrict__ p, const Chunk<T, kSize>& chunk) {
  constexpr int kStores = kSize * sizeof(T) / kVectorBytes;
#pragma unroll
  for (int i = 0; i < kStores; ++i) reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(&chunk)[i];
}

// Sum plus the squares of a chunk, element by element. By fma: otherwise each compiler and each caller could round the
// squares differently, and equal rows could have different sums.
template <typename Sum, typename T, int kSize>
__device__ __forceinline__ Sum add_squares(Sum sum, const Chunk<T, kSize>& chunk) {
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const Sum v = chunk[j];
    sum = fma(v, v, sum);
  }
  return sum;
}

// Sum plus the squares of chunk - shift.
template <typename Sum, typename T, typename B, int kSize>
__device__ __forceinline__ Sum add_squares(Sum sum, const Chunk<T, kSize>& chunk, const Chunk<B, kSize>& shift) {
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const Sum v = chunk[j] - static_cast<Sum>(shift[j]);
    sum = fma(v, v, sum);
  }
  return sum;
}

// Arithmetic on two neighbouring elements at once. On 16-bit types a product or a sum is rounded once; PyTorch computes
// it in float32 and rounds that. The results are bitwise identical, since a float32 holds any product of two of them,
// and any sum of two that is near a tie.
template <typename T>
struct Pairwise {
  using type = float2;
  static __device__ __forceinline__ float2 from(float a, float b) { return {a, b}; }
  static __device__ __forceinline__ float2 multiply(float2 a, float2 b) {
    return {__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y)};
  }
  static __device__ __forceinline__ float2 add(float2 a, float2 b) {
    return {__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y)};
  }
  static __device__ __forceinline__ float2 subtract(float2 a, float2 b) {
    return {__fsub_rn(a.x, b.x), __fsub_rn(a.y, b.y)};
  }
};
template <>
struct Pairwise<__half> {
  using type = __half2;
  static __device__ __forceinline__ __half2 from(float a, float b) { return __floats2half2_rn(a, b); }
  static __device__ __forceinline__ __half2 multiply(__half2 a, __half2 b) { return __hmul2_rn(a, b); }
  static __device__ __forceinline__ __half2 add(__half2 a, __half2 b) { return __hadd2_rn(a, b); }
  static __device__ __forceinline__ __half2 subtract(__half2 a, __half2 b) { return __hsub2_rn(a, b); }
};
template <>
struct Pairwise<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ __forceinline__ __nv_bfloat162 from(float a, float b) { return __floats2bfloat162_rn(a, b); }
  static __device__ __forceinline__ __nv_bfloat162 multiply(__nv_bfloat162 a, __nv_bfloat162 b) {
    return __hmul2_rn(a, b);
  }
  static __device__ __forceinline__ __nv_bfloat162 add(__nv_bfloat162 a, __nv_bfloat162 b) { return __hadd2_rn(a, b); }
  static __device__ __forceinline__ __nv_bfloat162 subtract(__nv_bfloat162 a, __nv_bfloat162 b) {
    return __hsub2_rn(a, b);
  }
};

template <typename T, typename Operation>
__device__ __forceinline__ Chunk<T> pairwise(const Chunk<T>& a, const Chunk<T>& b, Operation operation) {
  using Pair = typename Pairwise<T>::type;
  Chunk<T> out;
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    reinterpret_cast<Pair*>(&out)[i] =
        operation(reinterpret_cast<const Pair*>(&a)[i], reinterpret_cast<const Pair*>(&b)[i]);
  }
  return out;
}

template <typename T>
__device__ __forceinline__ Chunk<T> multiply(const Chunk<T>& a, const Chunk<T>& b) {
  return pairwise(a, b, Pairwise<T>::multiply);
}

template <typename T>
__device__ __forceinline__ Chunk<T> add(const Chunk<T>& a, const Chunk<T>& b) {
  return pairwise(a, b, Pairwise<T>::add);
}

template <typename T>
__device__ __forceinline__ Chunk<T> subtract(const Chunk<T>& a, const Chunk<T>& b) {
  return pairwise(a, b, Pairwise<T>::subtract);
}

// Rounds float32 values to nearest even, as PyTorch's operators store their results.
template <typename T>
__device__ __forceinline__ Chunk<T> rounded(const float (&values)[kVector]) {
  Chunk<T> out;
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    reinterpret_cast<typename Pairwise<T>::type*>(&out)[i] = Pairwise<T>::from(values[2 * i], values[2 * i + 1]);
  }
  return out;
}

// h * rstd * weight of an RMSNorm, rounded where the modules round: h * rstd before the product with the weight, or
// with `kUnitOffset` only h * rstd * (1 + weight).
template <typename T, bool kUnitOffset>
__device__ __forceinline__ Chunk<T> normalized(const Chunk<T>& chunk, float rstd, const Chunk<T>& weight) {
  float scaled[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    scaled[j] = __fmul_rn(chunk[j], rstd);
    if constexpr (kUnitOffset) scaled[j] = __fmul_rn(scaled[j], 1.0f + weight[j]);
  }
  if constexpr (kUnitOffset) return rounded<T>(scaled);
  return multiply(weight, rounded<T>(scaled));
}

// Stores the sum of a row, if the row is among every `step`-th from `phase` on.
__device__ __forceinline__ void store_row_sum(float* __restrict__ sums, int64_t row, int64_t step, int64_t phase,
                                              float value) {
  if (step == 1) {
    sums[row] = value;
  } else if (row >= phase && (row - phase) % step == 0) {
    sums[(row - phase) / step] = value;
  }
}

}  // namespace plop_ext
