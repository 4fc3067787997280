// One block per row, the row in registers: x and the residual are read once, hidden and normed are written once, and
// the same pass yields the sums of squares. Bound by memory bandwidth.
#include "../add_rms_norm.h"
#include "elements.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace plop_ext {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kMaxChunks = 4;  // of a thread
static_assert(int64_t{kMaxThreads} * kMaxChunks * kVector >= kMaxNormFeatures, "a block holds the widest row");

// Blocks per multiprocessor, so that other rows load while one waits at a barrier. On an H200 one block more or less
// costs 5 % of the bandwidth at K = 4096 in bf16. Two norms have two barriers: four chunks per thread in blocks of half
// as many threads gain 10 % there.
template <typename T, int kChunks, int kMostThreads>
constexpr int kMinBlocks = sizeof(T) == 2 && kChunks * kMostThreads < kMaxChunks * kMaxThreads ? 3 : 1;

template <typename T, int kChunks, int kMostThreads, bool kInner, bool kUnitOffset>
__global__ void __launch_bounds__(kMostThreads, kMinBlocks<T, kChunks, kMostThreads>)
    add_rms_norm_kernel(const AddRmsNormArgs args, const int64_t first_row) {
  __shared__ float scratch_x[2][kWarpSize];
  __shared__ float scratch_h[1][kWarpSize];
  __shared__ float scratch_n[1][kWarpSize];
  await_previous_kernel();

  const int64_t row = first_row + blockIdx.x;
  const int chunks = static_cast<int>(args.in_features / kVector);
  const float mean_factor = 1.0f / static_cast<float>(args.in_features);
  const T* __restrict__ x = static_cast<const T*>(args.x) + row * args.in_features;
  const T* __restrict__ residual = static_cast<const T*>(args.residual);
  const T* __restrict__ bias = static_cast<const T*>(args.bias);
  const T* __restrict__ weight = static_cast<const T*>(args.weight);
  const T* __restrict__ inner_weight = static_cast<const T*>(args.inner_weight);
  T* __restrict__ hidden = args.hidden == nullptr ? nullptr : static_cast<T*>(args.hidden) + row * args.in_features;
  T* __restrict__ normed = static_cast<T*>(args.normed) + row * args.in_features;

  // Threads past the end of the row load its last chunk again: without branches, all loads are in flight before the
  // first is used.
  int places[kChunks];
  bool inside[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = threadIdx.x + i * blockDim.x;
    inside[i] = chunk < chunks;
    places[i] = (inside[i] ? chunk : chunks - 1) * kVector;
  }
  Chunk<T> read[kChunks];
  Chunk<T> added[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) read[i] = load_chunk(x + places[i]);
  if (residual != nullptr) {
    residual += row * args.in_features;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) added[i] = load_chunk(residual + places[i]);
  }

  float sums[2] = {};  // of (x - bias)^2; of x^2 or, without an inner norm, hidden^2
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (!inside[i]) continue;
    sums[0] =
        bias == nullptr ? add_squares(sums[0], read[i]) : add_squares(sums[0], read[i], load_chunk(bias + places[i]));
    if constexpr (!kInner) {
      if (residual != nullptr) read[i] = add(added[i], read[i]);
      if (hidden != nullptr) store_chunk(hidden + places[i], read[i]);
    }
    sums[1] = add_squares(sums[1], read[i]);
  }
  block_sums(sums, scratch_x);
  if (threadIdx.x == 0 && args.x_sumsq != nullptr) {
    store_row_sum(args.x_sumsq, row, args.step, args.phase, sums[0]);
  }

  float hidden_sumsq[1] = {sums[1]};
  if constexpr (kInner) {
    const float inner_rstd = rsqrtf(sums[1] * mean_factor + args.inner_eps);
    hidden_sumsq[0] = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (!inside[i]) continue;
      read[i] = normalized<T, kUnitOffset>(read[i], inner_rstd, load_chunk(inner_weight + places[i]));
      if (residual != nullptr) read[i] = add(added[i], read[i]);
      if (hidden != nullptr) store_chunk(hidden + places[i], read[i]);
      hidden_sumsq[0] = add_squares(hidden_sumsq[0], read[i]);
    }
    block_sums(hidden_sumsq, scratch_h);
  }

  const float rstd = rsqrtf(hidden_sumsq[0] * mean_factor + args.eps);
  float normed_sumsq[1] = {};
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (!inside[i]) continue;
    const Chunk<T> out = normalized<T, kUnitOffset>(read[i], rstd, load_chunk(weight + places[i]));
    store_chunk(normed + places[i], out);
    normed_sumsq[0] = add_squares(normed_sumsq[0], out);
  }
  if (args.normed_sumsq != nullptr) {
    block_sums(normed_sumsq, scratch_n);
    if (threadIdx.x == 0) store_row_sum(args.normed_sumsq, row, args.step, args.phase, normed_sumsq[0]);
  }
}

template <typename T, int kChunks, int kMostThreads, bool kInner, bool kUnitOffset>
void enqueue(const AddRmsNormArgs& args, cudaStream_t stream) {
  const int64_t chunks = args.in_features / kVector;
  const int64_t warps = (chunks + kChunks * kWarpSize - 1) / (kChunks * kWarpSize);
  for_grids(args.n_rows, 1, [&](int64_t row, dim3 grid) {
    launch(add_rms_norm_kernel<T, kChunks, kMostThreads, kInner, kUnitOffset>, grid, warps * kWarpSize, stream, args,
           row);
  });
}

template <typename T, bool kInner, bool kUnitOffset>
void enqueue_by_width(const AddRmsNormArgs& args, cudaStream_t stream) {
  constexpr int kChunks = kInner ? kMaxChunks : kMaxChunks / 2;
  constexpr int kMostThreads = kInner ? kMaxThreads / 2 : kMaxThreads;
  if (args.in_features <= int64_t{kChunks} * kVector * kMostThreads) {
    enqueue<T, kChunks, kMostThreads, kInner, kUnitOffset>(args, stream);
  } else {
    enqueue<T, kMaxChunks, kMaxThreads, kInner, kUnitOffset>(args, stream);
  }
}

template <typename T>
void enqueue_by_form(const AddRmsNormArgs& args, cudaStream_t stream) {
  if (args.inner_weight != nullptr) {
    if (args.unit_offset) {
      enqueue_by_width<T, true, true>(args, stream);
    } else {
      enqueue_by_width<T, true, false>(args, stream);
    }
  } else if (args.unit_offset) {
    enqueue_by_width<T, false, true>(args, stream);
  } else {
    enqueue_by_width<T, false, false>(args, stream);
  }
}

}  // namespace

const char* launch_add_rms_norm(const AddRmsNormArgs& args, void* stream) {
  return for_narrow_type(
      args.dtype, [&](auto value) { enqueue_by_form<decltype(value)>(args, static_cast<cudaStream_t>(stream)); });
}

}  // namespace plop_ext
