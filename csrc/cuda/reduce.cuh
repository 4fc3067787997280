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

// Sums of kValues values over a block of any whole number of warps, valid on every thread. Each call of a kernel needs
// a `scratch` of its own: one barrier is all there is.
template <int kValues>
__device__ __forceinline__ void block_sums(float (&values)[kValues], float (&scratch)[kValues][kWarpSize]) {
  const int warps = blockDim.x / kWarpSize;
#pragma unroll
  for (int v = 0; v < kValues; ++v) values[v] = group_sum<kWarpSize>(values[v]);
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) scratch[v][threadIdx.x / kWarpSize] = values[v];
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    values[v] = scratch[v][0];
    for (int warp = 1; warp < warps; ++warp) values[v] += scratch[v][warp];
  }
}

}  // namespace plop_ext
