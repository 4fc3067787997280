// One warp per token, for all heads of q and k: each is read once and written once. A lane owns the same two chunks of
// every head that it handles, which rotate into each other, so it loads cos and sin once. The D / 16 lanes of a head
// are neighbours and normalize it by shuffles. Bound by memory bandwidth.
#include "../rotary.h"
#include "elements.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace plop_ext {
namespace {

// Two warps: a small batch still spreads over all multiprocessors.
constexpr int kThreads = 64;
constexpr int kUnit = static_cast<int>(kRotaryUnit);
static_assert(kMaxHeadDim / kUnit <= kWarpSize, "a head has no more units than a warp has lanes");
// Heads in flight per lane, and blocks per multiprocessor: with a norm, fewer registers matter more than more loads. On
// an H200 with heads of 128 in bf16, each choice made the other way costs at least 5 % of the bandwidth.
template <bool kNorm>
constexpr int kUnroll = kNorm ? 2 : 4;
// On other architectures than Hopper 11 blocks leave too few registers and the kernel spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kNormBlocks = 11;
#else
constexpr int kNormBlocks = 10;
#endif
template <typename T, bool kNorm>
constexpr int kMinBlocks = sizeof(T) == 2 ? (kNorm ? kNormBlocks : 10) : 1;

// Sum over the `width` (a power of two) neighbouring lanes of a head, valid on every lane.
__device__ __forceinline__ float head_sum(float value, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Keeps the compiler from hoisting the widening of `chunk` out of a loop: the widened values take twice the registers.
template <typename T>
__device__ __forceinline__ void keep_packed(Chunk<T>& chunk) {
#pragma unroll
  for (size_t i = 0; i < sizeof(chunk) / sizeof(uint32_t); ++i) {
    asm volatile("" : "+r"(reinterpret_cast<uint32_t*>(&chunk)[i]));
  }
}

// A lane's token, its place among the heads, and its part of cos and sin.
template <typename T>
struct Lane {
  int64_t row;
  int units;     // lanes per head
  int together;  // heads side by side in the warp; surplus lanes repeat the work of the last head
  int slot;      // which of these heads is this lane's
  int low;       // offsets of its two chunks in a head
  int high;
  bool rotates;  // false: the chunks are copied
  Chunk<T> cos_low, cos_high, sin_low, sin_high;
};

// All heads of q or of k of one token; returns this lane's share of the sum of squares.
template <typename T, bool kNorm, bool kUnitOffset>
__device__ __forceinline__ float rotate_heads(const RotaryHeads& part, const Lane<T>& lane, int head_dim, float eps) {
  const int heads = static_cast<int>(part.heads);
  const T* __restrict__ x = static_cast<const T*>(part.x) + lane.row * part.stride;
  const T* __restrict__ bias = static_cast<const T*>(part.bias);
  T* __restrict__ out = static_cast<T*>(part.out) + lane.row * part.heads * head_dim;
  Chunk<T> weight_low, weight_high;
  if constexpr (kNorm) {
    weight_low = load_chunk(static_cast<const T*>(part.weight) + lane.low);
    weight_high = load_chunk(static_cast<const T*>(part.weight) + lane.high);
  }
  float total = 0.0f;
  for (int first = 0; first < heads; first += kUnroll<kNorm> * lane.together) {
    Chunk<T> lows[kUnroll<kNorm>];
    Chunk<T> highs[kUnroll<kNorm>];
    // Past the last head, load that head again: no branch between the loads.
#pragma unroll
    for (int u = 0; u < kUnroll<kNorm>; ++u) {
      const int place = min(first + u * lane.together + lane.slot, heads - 1) * head_dim;
      lows[u] = load_chunk(x + place + lane.low);
      highs[u] = load_chunk(x + place + lane.high);
    }
#pragma unroll
    for (int u = 0; u < kUnroll<kNorm>; ++u) {
      const int head = first + u * lane.together + lane.slot;
      const int place = head * head_dim;
      const bool mine = head < heads && lane.slot < lane.together;
      const float sum = add_squares(add_squares(0.0f, lows[u]), highs[u]);
      if (mine && bias != nullptr) {
        total += add_squares(add_squares(0.0f, lows[u], load_chunk(bias + place + lane.low)), highs[u],
                             load_chunk(bias + place + lane.high));
      } else if (mine) {
        total += sum;
      }
      Chunk<T> low = lows[u];
      Chunk<T> high = highs[u];
      if constexpr (kNorm) {  // on every lane: `head_sum` shuffles
        keep_packed(weight_low);
        keep_packed(weight_high);
        const float rstd = rsqrtf(head_sum(sum, lane.units) * (1.0f / static_cast<float>(head_dim)) + eps);
        low = normalized<T, kUnitOffset>(low, rstd, weight_low);
        high = normalized<T, kUnitOffset>(high, rstd, weight_high);
      }
      if (!mine) continue;
      if (lane.rotates) {
        store_chunk(out + place + lane.low, subtract(multiply(low, lane.cos_low), multiply(high, lane.sin_low)));
        store_chunk(out + place + lane.high, add(multiply(high, lane.cos_high), multiply(low, lane.sin_high)));
      } else {
        store_chunk(out + place + lane.low, low);
        store_chunk(out + place + lane.high, high);
      }
    }
  }
  return total;
}

template <typename T, bool kNorm, bool kUnitOffset>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T, kNorm>)
    rotary_kernel(const RotaryArgs args, const int64_t first_row) {
  await_previous_kernel();
  const int index = threadIdx.x % kWarpSize;
  const int head_dim = static_cast<int>(args.head_dim);
  const int rotary_dim = static_cast<int>(args.rotary_dim);
  Lane<T> lane;
  lane.row = first_row + int64_t{blockIdx.x} * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (lane.row >= args.n_rows) return;  // a whole warp
  lane.units = head_dim / kUnit;
  lane.together = kWarpSize / lane.units;
  lane.slot = index / lane.units;
  // The first R / 16 lanes of a head rotate; each other lane has two neighbouring chunks.
  const int unit = index % lane.units;
  lane.rotates = unit < rotary_dim / kUnit;
  lane.low = lane.rotates ? unit * kVector : rotary_dim + 2 * (unit * kVector - rotary_dim / 2);
  lane.high = lane.low + (lane.rotates ? rotary_dim / 2 : kVector);
  const int64_t table = (lane.row % args.cos_rows) * rotary_dim;
  const T* __restrict__ cos = static_cast<const T*>(args.cos) + table;
  const T* __restrict__ sin = static_cast<const T*>(args.sin) + table;
  // A lane that does not rotate loads the start of the table, and does not use it.
  const int low = lane.rotates ? lane.low : 0;
  const int high = lane.rotates ? lane.high : 0;
  lane.cos_low = load_chunk(cos + low);
  lane.cos_high = load_chunk(cos + high);
  lane.sin_low = load_chunk(sin + low);
  lane.sin_high = load_chunk(sin + high);

  const float q_sum = rotate_heads<T, kNorm, kUnitOffset>(args.q, lane, head_dim, args.eps);
  const float k_sum = rotate_heads<T, kNorm, kUnitOffset>(args.k, lane, head_dim, args.eps);
  if (args.q.sumsq != nullptr) {
    const float sum = group_sum<kWarpSize>(q_sum);
    if (index == 0) store_row_sum(args.q.sumsq, lane.row, args.step, args.phase, sum);
  }
  if (args.k.sumsq != nullptr) {
    const float sum = group_sum<kWarpSize>(k_sum);
    if (index == 0) store_row_sum(args.k.sumsq, lane.row, args.step, args.phase, sum);
  }
}

template <typename T, bool kNorm, bool kUnitOffset>
void enqueue(const RotaryArgs& args, cudaStream_t stream) {
  for_grids(args.n_rows, kThreads / kWarpSize, [&](int64_t row, dim3 grid) {
    launch(rotary_kernel<T, kNorm, kUnitOffset>, grid, kThreads, stream, args, row);
  });
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
  return for_narrow_type(
      args.dtype, [&](auto value) { enqueue_by_norm<decltype(value)>(args, static_cast<cudaStream_t>(stream)); });
}

}  // namespace plop_ext
