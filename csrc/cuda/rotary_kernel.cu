// One warp per token, all heads of q and k: each is read once and written once. A lane owns the same two packs, which
// rotate into each other, of every head it handles, so it loads cos and sin once; the D / 16 lanes of a head are
// neighbours and norm it with shuffles. Bound by memory bandwidth.
#include <cuda_runtime.h>

#include "../rotary.h"
#include "elements.cuh"
#include "reduce.cuh"

namespace plop_ext {
namespace {

constexpr int64_t kMaxGrid = int64_t{1} << 30;
// Two warps: a small batch still spreads over all multiprocessors.
constexpr int kThreads = 64;
// Heads in flight per lane.
constexpr int kUnroll = 4;

// Sum over the `width` (a power of two) neighbouring lanes of a head; every lane gets it.
__device__ __forceinline__ float head_sum(float value, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

template <typename T, bool kNorm, bool kUnitOffset>
__global__ void __launch_bounds__(kThreads) rotary_kernel(const RotaryArgs args, const int64_t first_row) {
  const int64_t row = first_row + int64_t{blockIdx.x} * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= args.n_rows) return;  // a whole warp
  const int lane = threadIdx.x % kWarpSize;
  const int head_dim = static_cast<int>(args.head_dim);
  const int rotary_dim = static_cast<int>(args.rotary_dim);
  const int units = head_dim / (2 * kPack);  // lanes of one head
  const int together = kWarpSize / units;    // heads side by side; lanes that are left over repeat the last one's work
  const int unit = lane % units;
  const int slot = lane / units;
  const int q_heads = static_cast<int>(args.q.heads);
  const int heads = q_heads + static_cast<int>(args.k.heads);

  // Where this lane's packs are in a head. The first R / 16 units rotate, the others pass two neighbouring packs on.
  const bool rotates = unit < rotary_dim / (2 * kPack);
  const int low = rotates ? unit * kPack : rotary_dim + 2 * (unit * kPack - rotary_dim / 2);
  const int high = low + (rotates ? rotary_dim / 2 : kPack);
  const int64_t table = (row % args.cos_rows) * rotary_dim;
  const T* __restrict__ cos = static_cast<const T*>(args.cos) + table;
  const T* __restrict__ sin = static_cast<const T*>(args.sin) + table;
  // A lane that does not rotate loads what it will not use, from inside the table.
  const int low_place = rotates ? low : 0;
  const int high_place = rotates ? high : 0;
  const Pack<T> cos_low = load_pack(cos + low_place);
  const Pack<T> cos_high = load_pack(cos + high_place);
  const Pack<T> sin_low = load_pack(sin + low_place);
  const Pack<T> sin_high = load_pack(sin + high_place);

  const T* __restrict__ q = static_cast<const T*>(args.q.x) + row * args.q.stride;
  const T* __restrict__ k = static_cast<const T*>(args.k.x) + row * args.k.stride;
  T* __restrict__ q_out = static_cast<T*>(args.q.out) + row * args.q.heads * head_dim;
  T* __restrict__ k_out = static_cast<T*>(args.k.out) + row * args.k.heads * head_dim;

  float q_sum = 0.0f;
  float k_sum = 0.0f;
  for (int first = 0; first < heads; first += kUnroll * together) {
    Pack<T> lows[kUnroll];
    Pack<T> highs[kUnroll];
    // Past the last head that one again: no branch between the loads.
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int head = min(first + u * together + slot, heads - 1);
      const T* __restrict__ x = head < q_heads ? q + head * head_dim : k + (head - q_heads) * head_dim;
      lows[u] = load_pack(x + low);
      highs[u] = load_pack(x + high);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int head = min(first + u * together + slot, heads - 1);
      const bool mine = slot < together && first + u * together + slot < heads;
      const bool is_q = head < q_heads;
      const int place = (is_q ? head : head - q_heads) * head_dim;
      float sum = add_squares(add_squares(0.0f, lows[u]), highs[u]);
      Pack<T> normed_low = lows[u];
      Pack<T> normed_high = highs[u];
      if constexpr (kNorm) {  // with every lane, since they shuffle
        const float rstd = rsqrtf(head_sum(sum, units) * (1.0f / static_cast<float>(head_dim)) + args.eps);
        const T* __restrict__ weight = static_cast<const T*>(is_q ? args.q.weight : args.k.weight);
        normed_low = normalized<T, kUnitOffset>(lows[u], rstd, load_pack(weight + low));
        normed_high = normalized<T, kUnitOffset>(highs[u], rstd, load_pack(weight + high));
      }
      if (!mine) continue;
      const T* __restrict__ bias = static_cast<const T*>(is_q ? args.q.bias : args.k.bias);
      if (bias != nullptr) {
        sum = add_squares(0.0f, lows[u], load_pack(bias + place + low));
        sum = add_squares(sum, highs[u], load_pack(bias + place + high));
      }
      (is_q ? q_sum : k_sum) += sum;
      T* __restrict__ out = (is_q ? q_out : k_out) + place;
      if (rotates) {
        store_pack(out + low, subtract(multiply(normed_low, cos_low), multiply(normed_high, sin_low)));
        store_pack(out + high, add(multiply(normed_high, cos_high), multiply(normed_low, sin_high)));
      } else {
        store_pack(out + low, normed_low);
        store_pack(out + high, normed_high);
      }
    }
  }
  if (args.q.sumsq != nullptr) {
    const float sum = group_sum<kWarpSize>(q_sum);
    if (lane == 0) store_row_sum(args.q.sumsq, row, args.step, args.phase, sum);
  }
  if (args.k.sumsq != nullptr) {
    const float sum = group_sum<kWarpSize>(k_sum);
    if (lane == 0) store_row_sum(args.k.sumsq, row, args.step, args.phase, sum);
  }
}

template <typename T, bool kNorm, bool kUnitOffset>
void enqueue(const RotaryArgs& args, cudaStream_t stream) {
  constexpr int64_t kRows = kThreads / kWarpSize;
  for (int64_t row = 0; row < args.n_rows; row += kMaxGrid * kRows) {
    const int64_t blocks = (args.n_rows - row + kRows - 1) / kRows;
    const unsigned grid = static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid);
    rotary_kernel<T, kNorm, kUnitOffset><<<grid, kThreads, 0, stream>>>(args, row);
  }
}

template <typename T>
void enqueue_by_norm(const RotaryArgs& args, cudaStream_t stream) {
  if (args.q.weight == nullptr) {
    enqueue<T, false, false>(args, stream);
  } else if (args.unit_offset) {
    enqueue<T, true, true>(args, stream);
  } else {
    enqueue<T, true, false>(args, stream);
  }
}

}  // namespace

const char* launch_rotary(const RotaryArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::kFloat32:
      enqueue_by_norm<float>(args, cuda_stream);
      break;
    case DType::kFloat16:
      enqueue_by_norm<__half>(args, cuda_stream);
      break;
    case DType::kBFloat16:
      enqueue_by_norm<__nv_bfloat16>(args, cuda_stream);
      break;
    case DType::kFloat64:
      return "float64 has no kernel";
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace plop_ext
