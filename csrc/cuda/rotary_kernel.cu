// One block per token, all heads of q and k: each is read once and written once. A thread owns the same two packs of
// every head it handles, which rotate into each other, so it loads cos and sin once; the D / 16 threads of a head are
// neighbours and norm it with shuffles. Bound by memory bandwidth.
#include <cuda_runtime.h>

#include <numeric>

#include "../rotary.h"
#include "elements.cuh"
#include "reduce.cuh"

namespace plop_ext {
namespace {

constexpr int64_t kMaxGrid = int64_t{1} << 30;
// Heads of up to 256 elements fit: lcm(15, 32) = 480.
constexpr int kMaxThreads = 512;
// Heads in flight per thread.
constexpr int kUnroll = 2;

// Sum over the `width` (a power of two) neighbouring lanes of a head; every lane gets it.
__device__ __forceinline__ float head_sum(float value, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

template <typename T, bool kNorm, bool kUnitOffset>
__global__ void __launch_bounds__(kMaxThreads) rotary_kernel(const RotaryArgs args, const int64_t first_row) {
  __shared__ float scratch[2][kWarpSize];
  const int64_t row = first_row + blockIdx.x;
  const int head_dim = static_cast<int>(args.head_dim);
  const int rotary_dim = static_cast<int>(args.rotary_dim);
  const int units = head_dim / (2 * kPack);  // threads of one head
  const int unit = static_cast<int>(threadIdx.x) % units;
  const int lanes = static_cast<int>(blockDim.x) / units;  // heads of one round
  const int q_heads = static_cast<int>(args.q.heads);
  const int heads = q_heads + static_cast<int>(args.k.heads);

  // Where this thread's packs are in a head. The first R / 16 units rotate, the others pass two neighbouring packs on.
  const bool rotates = unit < rotary_dim / (2 * kPack);
  const int low = rotates ? unit * kPack : rotary_dim + 2 * (unit * kPack - rotary_dim / 2);
  const int high = low + (rotates ? rotary_dim / 2 : kPack);
  const int64_t table = (row % args.cos_rows) * rotary_dim;
  const T* __restrict__ cos = static_cast<const T*>(args.cos) + table;
  const T* __restrict__ sin = static_cast<const T*>(args.sin) + table;
  Pack<T> cos_low, cos_high, sin_low, sin_high;
  if (rotates) {
    cos_low = load_pack(cos + low);
    cos_high = load_pack(cos + high);
    sin_low = load_pack(sin + low);
    sin_high = load_pack(sin + high);
  }

  float sums[2] = {};  // q, k
  // The bound is the same for the whole block, since the shuffles of a norm need every lane.
  for (int first = 0; first < heads; first += kUnroll * lanes) {
    Pack<T> lows[kUnroll];
    Pack<T> highs[kUnroll];
    // Past the last head that one again: no branch between the loads.
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int wanted = first + u * lanes + static_cast<int>(threadIdx.x) / units;
      const int head = wanted < heads ? wanted : heads - 1;
      const bool is_q = head < q_heads;
      const T* __restrict__ x =
          is_q ? static_cast<const T*>(args.q.x) + row * args.q.stride + head * head_dim
               : static_cast<const T*>(args.k.x) + row * args.k.stride + (head - q_heads) * head_dim;
      lows[u] = load_pack(x + low);
      highs[u] = load_pack(x + high);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int wanted = first + u * lanes + static_cast<int>(threadIdx.x) / units;
      const int head = wanted < heads ? wanted : heads - 1;
      const bool is_q = head < q_heads;
      const int own = is_q ? head : head - q_heads;
      const T* __restrict__ bias = static_cast<const T*>(is_q ? args.q.bias : args.k.bias);
      Pack<T> normed_low = lows[u];
      Pack<T> normed_high = highs[u];
      float sum = add_squares(add_squares(0.0f, lows[u]), highs[u]);
      if constexpr (kNorm) {
        const float rstd = rsqrtf(head_sum(sum, units) * (1.0f / static_cast<float>(head_dim)) + args.eps);
        const T* __restrict__ weight = static_cast<const T*>(is_q ? args.q.weight : args.k.weight);
        normed_low = normalized<T, kUnitOffset>(lows[u], rstd, load_pack(weight + low));
        normed_high = normalized<T, kUnitOffset>(highs[u], rstd, load_pack(weight + high));
      }
      if (bias != nullptr) {
        const T* __restrict__ shift = bias + own * head_dim;
        sum = add_squares(add_squares(0.0f, lows[u], load_pack(shift + low)), highs[u], load_pack(shift + high));
      }
      if (wanted < heads) sums[is_q ? 0 : 1] += sum;
      if (wanted >= heads) continue;
      T* __restrict__ out = static_cast<T*>(is_q ? args.q.out : args.k.out) +
                            (row * (is_q ? args.q.heads : args.k.heads) + own) * head_dim;
      if (rotates) {
        store_pack(out + low, subtract(multiply(normed_low, cos_low), multiply(normed_high, sin_low)));
        store_pack(out + high, add(multiply(normed_high, cos_high), multiply(normed_low, sin_high)));
      } else {
        store_pack(out + low, normed_low);
        store_pack(out + high, normed_high);
      }
    }
  }
  if (args.q.sumsq == nullptr && args.k.sumsq == nullptr) return;
  block_sums(sums, scratch);
  if (threadIdx.x == 0) {
    if (args.q.sumsq != nullptr) store_row_sum(args.q.sumsq, row, args.step, args.phase, sums[0]);
    if (args.k.sumsq != nullptr) store_row_sum(args.k.sumsq, row, args.step, args.phase, sums[1]);
  }
}

template <typename T, bool kNorm, bool kUnitOffset>
void enqueue(const RotaryArgs& args, cudaStream_t stream) {
  // Whole warps of whole heads, and of these as many as finish a token in one round of kUnroll heads a thread.
  const int64_t units = args.head_dim / (2 * kPack);
  const int64_t base = std::lcm(units, int64_t{kWarpSize});
  const int64_t heads = args.q.heads + args.k.heads;
  const int64_t wanted = (heads * units + kUnroll * base - 1) / (kUnroll * base);
  const int64_t most = kMaxThreads / base;
  const int64_t threads = base * (wanted < most ? wanted : most);
  for (int64_t row = 0; row < args.n_rows; row += kMaxGrid) {
    const int64_t rows = args.n_rows - row < kMaxGrid ? args.n_rows - row : kMaxGrid;
    rotary_kernel<T, kNorm, kUnitOffset>
        <<<static_cast<unsigned>(rows), static_cast<unsigned>(threads), 0, stream>>>(args, row);
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
