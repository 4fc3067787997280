// Elements of the types the kernels read, widened for arithmetic, and 16-byte accesses to eight of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace plop_ext {

constexpr int kVectorBytes = 16;
// Elements a thread of a fused kernel handles together: one 16-byte access of 16-bit types, two of float32.
constexpr int kPack = 8;

__device__ __forceinline__ float load_value(float v) { return v; }
__device__ __forceinline__ double load_value(double v) { return v; }
__device__ __forceinline__ float load_value(__half v) { return __half2float(v); }
__device__ __forceinline__ float load_value(__nv_bfloat16 v) { return __bfloat162float(v); }

// The `j`-th of elements that lie in registers. A bfloat16 is the upper half of its float32: a shift or a mask of the
// word it lies in. The compiler takes two instructions for the upper one.
template <typename T>
__device__ __forceinline__ auto element(const T* __restrict__ values, int j) {
  return load_value(values[j]);
}
template <>
__device__ __forceinline__ auto element(const __nv_bfloat16* __restrict__ values, int j) {
  const uint32_t word = reinterpret_cast<const uint32_t*>(values)[j / 2];
  return __uint_as_float(j % 2 == 0 ? word << 16 : word & 0xffff0000u);
}

template <typename T>
struct alignas(kVectorBytes) Pack {
  T values[kPack];

  __device__ __forceinline__ float operator[](int j) const { return element(values, j); }
};

// The same operation on two neighbours at once. On 16-bit types a product or a sum is rounded once; PyTorch computes it
// in float32 and rounds that: the same bits, since a float32 holds any product of two of them, and any sum of two that
// is near a tie.
template <typename T>
struct Two {
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
struct Two<__half> {
  using type = __half2;
  static __device__ __forceinline__ __half2 from(float a, float b) { return __floats2half2_rn(a, b); }
  static __device__ __forceinline__ __half2 multiply(__half2 a, __half2 b) { return __hmul2_rn(a, b); }
  static __device__ __forceinline__ __half2 add(__half2 a, __half2 b) { return __hadd2_rn(a, b); }
  static __device__ __forceinline__ __half2 subtract(__half2 a, __half2 b) { return __hsub2_rn(a, b); }
};
template <>
struct Two<__nv_bfloat16> {
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
__device__ __forceinline__ Pack<T> by_two(const Pack<T>& a, const Pack<T>& b, Operation operation) {
  using Pair = typename Two<T>::type;
  Pack<T> out;
#pragma unroll
  for (int i = 0; i < kPack / 2; ++i) {
    reinterpret_cast<Pair*>(&out)[i] =
        operation(reinterpret_cast<const Pair*>(&a)[i], reinterpret_cast<const Pair*>(&b)[i]);
  }
  return out;
}

template <typename T>
__device__ __forceinline__ Pack<T> multiply(const Pack<T>& a, const Pack<T>& b) {
  return by_two(a, b, Two<T>::multiply);
}

template <typename T>
__device__ __forceinline__ Pack<T> add(const Pack<T>& a, const Pack<T>& b) {
  return by_two(a, b, Two<T>::add);
}

template <typename T>
__device__ __forceinline__ Pack<T> subtract(const Pack<T>& a, const Pack<T>& b) {
  return by_two(a, b, Two<T>::subtract);
}

// Rounds to nearest even, as PyTorch's operators store their results.
template <typename T>
__device__ __forceinline__ Pack<T> rounded(const float (&values)[kPack]) {
  Pack<T> out;
#pragma unroll
  for (int i = 0; i < kPack / 2; ++i) {
    reinterpret_cast<typename Two<T>::type*>(&out)[i] = Two<T>::from(values[2 * i], values[2 * i + 1]);
  }
  return out;
}

// Sum plus the squares of pack.
template <typename T>
__device__ __forceinline__ float add_squares(float sum, const Pack<T>& pack) {
#pragma unroll
  for (int j = 0; j < kPack; ++j) sum += pack[j] * pack[j];
  return sum;
}

// Sum plus the squares of pack - shift.
template <typename T>
__device__ __forceinline__ float add_squares(float sum, const Pack<T>& pack, const Pack<T>& shift) {
#pragma unroll
  for (int j = 0; j < kPack; ++j) sum += (pack[j] - shift[j]) * (pack[j] - shift[j]);
  return sum;
}

// An RMSNorm's result, rounded where the modules round: h * rstd before the weight, or with `kUnitOffset` only at the
// end of h * rstd * (1 + weight).
template <typename T, bool kUnitOffset>
__device__ __forceinline__ Pack<T> normalized(const Pack<T>& pack, float rstd, const Pack<T>& weight) {
  float scaled[kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    scaled[j] = __fmul_rn(pack[j], rstd);
    if constexpr (kUnitOffset) scaled[j] = __fmul_rn(scaled[j], 1.0f + weight[j]);
  }
  if constexpr (kUnitOffset) return rounded<T>(scaled);
  return multiply(weight, rounded<T>(scaled));
}

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* __restrict__ p) {
  constexpr int kLoads = sizeof(Pack<T>) / kVectorBytes;
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    reinterpret_cast<uint4*>(&pack)[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
  }
  return pack;
}

template <typename T>
__device__ __forceinline__ void store_pack(T* __restrict__ p, const Pack<T>& pack) {
  constexpr int kStores = sizeof(Pack<T>) / kVectorBytes;
#pragma unroll
  for (int i = 0; i < kStores; ++i) reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(&pack)[i];
}

// Writes the sum of a row where every `step`-th row from `phase` on has one.
__device__ __forceinline__ void store_row_sum(float* __restrict__ sums, int64_t row, int64_t step, int64_t phase,
                                              float value) {
  if (step == 1) {
    sums[row] = value;
  } else if (row >= phase && (row - phase) % step == 0) {
    sums[(row - phase) / step] = value;
  }
}

}  // namespace plop_ext
