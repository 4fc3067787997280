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

// To nearest even, as PyTorch's operators store their results.
template <typename T>
__device__ __forceinline__ T store_value(float v);
template <>
__device__ __forceinline__ float store_value<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half store_value<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 store_value<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// What a tensor of T holds after v was stored to it.
template <typename T>
__device__ __forceinline__ float rounded(float v) {
  return load_value(store_value<T>(v));
}

template <typename T>
struct alignas(kVectorBytes) Pack {
  T values[kPack];

  __device__ __forceinline__ float operator[](int j) const { return load_value(values[j]); }
};

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
