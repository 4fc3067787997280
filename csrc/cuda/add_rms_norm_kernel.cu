// One block per row, the row in registers: x and the residual are read once, hidden and normed written once, and the
// sums of squares come out of the same pass. Bound by memory bandwidth.
#include <cuda_runtime.h>

#include "../add_rms_norm.h"
#include "elements.cuh"
#include "reduce.cuh"

namespace plop_ext {
namespace {

constexpr int64_t kMaxGrid = int64_t{1} << 30;
constexpr int kMaxThreads = 512;

// One factor at a time, so that no product is contracted with a following sum: float32 modules round each.
template <typename T, bool kUnitOffset>
__device__ __forceinline__ float normalized(float value, float rstd, float weight) {
  const float scaled = __fmul_rn(value, rstd);
  if constexpr (kUnitOffset) return rounded<T>(__fmul_rn(scaled, 1.0f + weight));
  return rounded<T>(__fmul_rn(weight, rounded<T>(scaled)));
}

template <typename T, int kPacks, bool kInner, bool kUnitOffset>
__global__ void __launch_bounds__(kMaxThreads) add_rms_norm_kernel(const AddRmsNormArgs args, const int64_t first_row) {
  __shared__ float scratch_x[2][kWarpSize];
  __shared__ float scratch_h[1][kWarpSize];
  __shared__ float scratch_n[1][kWarpSize];

  const int64_t row = first_row + blockIdx.x;
  const int packs = static_cast<int>(args.in_features / kPack);
  const float mean_factor = 1.0f / static_cast<float>(args.in_features);
  const T* __restrict__ x = static_cast<const T*>(args.x) + row * args.in_features;
  const T* __restrict__ residual = static_cast<const T*>(args.residual);
  const T* __restrict__ bias = static_cast<const T*>(args.bias);
  const T* __restrict__ weight = static_cast<const T*>(args.weight);
  const T* __restrict__ inner_weight = static_cast<const T*>(args.inner_weight);
  T* __restrict__ hidden = static_cast<T*>(args.hidden);
  T* __restrict__ normed = static_cast<T*>(args.normed) + row * args.in_features;

  // Threads past the end of the row load its last pack again: without a branch between them all loads are in flight
  // before the first is used.
  int places[kPacks];
  bool inside[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int pack = threadIdx.x + i * blockDim.x;
    inside[i] = pack < packs;
    places[i] = (inside[i] ? pack : packs - 1) * kPack;
  }
  Pack<T> read[kPacks];
  Pack<T> added[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) read[i] = load_pack(x + places[i]);
  if (residual != nullptr) {
    residual += row * args.in_features;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) added[i] = load_pack(residual + places[i]);
  }

  float h[kPacks][kPack];
  float sums[2] = {};  // of (x - bias)^2; of x^2 or, without an inner norm, hidden^2
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (!inside[i]) continue;
#pragma unroll
    for (int j = 0; j < kPack; ++j) h[i][j] = read[i][j];
    if (bias != nullptr) {
      const Pack<T> shift = load_pack(bias + places[i]);
#pragma unroll
      for (int j = 0; j < kPack; ++j) sums[0] += (h[i][j] - shift[j]) * (h[i][j] - shift[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kPack; ++j) sums[0] += h[i][j] * h[i][j];
    }
    if (!kInner && residual != nullptr) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) h[i][j] = rounded<T>(added[i][j] + h[i][j]);
    }
#pragma unroll
    for (int j = 0; j < kPack; ++j) sums[1] += h[i][j] * h[i][j];
  }
  block_sums(sums, scratch_x);
  if (threadIdx.x == 0 && args.x_sumsq != nullptr) {
    store_row_sum(args.x_sumsq, row, args.step, args.phase, sums[0]);
  }

  float hidden_sumsq = sums[1];
  if constexpr (kInner) {
    const float inner_rstd = rsqrtf(sums[1] * mean_factor + args.inner_eps);
    float sum[1] = {};
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (!inside[i]) continue;
      const Pack<T> scale = load_pack(inner_weight + places[i]);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        h[i][j] = normalized<T, kUnitOffset>(h[i][j], inner_rstd, scale[j]);
        if (residual != nullptr) h[i][j] = rounded<T>(__fadd_rn(added[i][j], h[i][j]));
        sum[0] += h[i][j] * h[i][j];
      }
    }
    block_sums(sum, scratch_h);
    hidden_sumsq = sum[0];
  }

  const float rstd = rsqrtf(hidden_sumsq * mean_factor + args.eps);
  float normed_sumsq[1] = {};
  if (hidden != nullptr) hidden += row * args.in_features;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (!inside[i]) continue;
    const Pack<T> scale = load_pack(weight + places[i]);
    Pack<T> out;
    if (hidden != nullptr) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) out.values[j] = store_value<T>(h[i][j]);
      store_pack(hidden + places[i], out);
    }
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const float value = normalized<T, kUnitOffset>(h[i][j], rstd, scale[j]);
      normed_sumsq[0] += value * value;
      out.values[j] = store_value<T>(value);
    }
    store_pack(normed + places[i], out);
  }
  if (args.normed_sumsq != nullptr) {
    block_sums(normed_sumsq, scratch_n);
    if (threadIdx.x == 0) store_row_sum(args.normed_sumsq, row, args.step, args.phase, normed_sumsq[0]);
  }
}

template <typename T, int kPacks, bool kInner, bool kUnitOffset>
void enqueue(const AddRmsNormArgs& args, cudaStream_t stream) {
  const int64_t packs = args.in_features / kPack;
  const int64_t warps = (packs + kPacks * kWarpSize - 1) / (kPacks * kWarpSize);
  for (int64_t row = 0; row < args.n_rows; row += kMaxGrid) {
    const int64_t rows = args.n_rows - row < kMaxGrid ? args.n_rows - row : kMaxGrid;
    add_rms_norm_kernel<T, kPacks, kInner, kUnitOffset>
        <<<static_cast<unsigned>(rows), static_cast<unsigned>(warps * kWarpSize), 0, stream>>>(args, row);
  }
}

template <typename T, bool kInner, bool kUnitOffset>
void enqueue_by_width(const AddRmsNormArgs& args, cudaStream_t stream) {
  // Two packs a thread: enough loads in flight, few registers.
  if (args.in_features <= int64_t{2} * kPack * kMaxThreads) {
    enqueue<T, 2, kInner, kUnitOffset>(args, stream);
  } else {
    enqueue<T, 4, kInner, kUnitOffset>(args, stream);
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
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::kFloat32:
      enqueue_by_form<float>(args, cuda_stream);
      break;
    case DType::kFloat16:
      enqueue_by_form<__half>(args, cuda_stream);
      break;
    case DType::kBFloat16:
      enqueue_by_form<__nv_bfloat16>(args, cuda_stream);
      break;
    case DType::kFloat64:
      return "float64 has no kernel";
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace plop_ext
