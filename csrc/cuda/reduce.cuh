// Sums over the threads that share a row or a cell, in a fixed order.
#pragma once

namespace plop_ext {

constexpr int kWarpSize = 32;

// Butterfly over groups of `kWidth` neighbouring lanes: the result is bitwise identical on every lane.
template <int kWidth, typename T>
__device__ __forceinline__ T group_sum(T value) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset, kWidth);
  return value;
}

// Sum over a block of kThreads, valid on thread 0. `scratch` holds kThreads / kWarpSize values; the next call may reuse
// it, because each call ends with a barrier.
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

// Sums of kValues values over a block of whole warps, valid on every thread. Each call in a kernel needs its own
// `scratch`: a call has one barrier, behind the writes, and none behind the reads.
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
