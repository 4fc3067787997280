// Sums over the threads that share a row or a cell, in a fixed order.
#pragma once

namespace plop_ext {

constexpr int kWarpSize = 32;

// Butterfly over groups of `kWidth` neighbouring lanes: every lane ends with the same bits.
template <int kWidth, typename T>
__device__ __forceinline__ T group_sum(T value) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset, kWidth);
  return value;
}

// Sum over a block of kThreads; the result is valid on thread 0. `scratch` holds kThreads / 32 values and may be reused
// by the next call, because each call ends with a barrier.
template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  constexpr int kWarps = kThreads / kWarpSize;
  value = group_sum<kWarpSize>(value);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    value = scratch[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) value += scratch[warp];
  }
  __syncthreads();
  return value;
}

}  // namespace plop_ext
