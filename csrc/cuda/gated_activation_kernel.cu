// One block per row: gate and up are read once, out is written once, and the same pass yields the sums of squares of
// all three. Bound by memory bandwidth; the exponential keeps a multiprocessor half busy.
#include "../gated_activation.h"
#include "activation.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace plop_ext {
namespace {

constexpr int kMaxThreads = 256;
// Chunks of gate and of up in flight per thread: 64 bytes for every type.
template <typename T>
constexpr int kUnroll = sizeof(T) == 2 ? 2 : 1;

template <typename T, Activation kActivation>
__global__ void __launch_bounds__(kMaxThreads)
    gated_activation_kernel(const GatedActivationArgs args, const int64_t first_row) {
  __shared__ float scratch[3][kWarpSize];
  await_previous_kernel();
  const int64_t row = first_row + blockIdx.x;
  const int chunks = static_cast<int>(args.features / kVector);
  const T* __restrict__ gate = static_cast<const T*>(args.gate) + row * args.gate_stride;
  const T* __restrict__ up = static_cast<const T*>(args.up) + row * args.up_stride;
  const T* __restrict__ gate_bias = static_cast<const T*>(args.gate_bias);
  const T* __restrict__ up_bias = static_cast<const T*>(args.up_bias);
  T* __restrict__ out = static_cast<T*>(args.out) + row * args.features;

  float sums[3] = {};  // gate, up, out
  for (int first = threadIdx.x; first < chunks; first += kUnroll<T> * blockDim.x) {
    Chunk<T> gates[kUnroll<T>];
    Chunk<T> ups[kUnroll<T>];
    // Past the end of the row, load its last chunk again: no branch between the loads.
#pragma unroll
    for (int u = 0; u < kUnroll<T>; ++u) {
      const int chunk = first + u * static_cast<int>(blockDim.x);
      const int place = (chunk < chunks ? chunk : chunks - 1) * kVector;
      gates[u] = load_chunk(gate + place);
      ups[u] = load_chunk(up + place);
    }
#pragma unroll
    for (int u = 0; u < kUnroll<T>; ++u) {
      const int chunk = first + u * static_cast<int>(blockDim.x);
      if (chunk >= chunks) continue;
      const int place = chunk * kVector;
      sums[0] = gate_bias == nullptr ? add_squares(sums[0], gates[u])
                                     : add_squares(sums[0], gates[u], load_chunk(gate_bias + place));
      sums[1] =
          up_bias == nullptr ? add_squares(sums[1], ups[u]) : add_squares(sums[1], ups[u], load_chunk(up_bias + place));
      float act[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) act[j] = activated<T, kActivation>(gates[u][j]);
      const Chunk<T> product = multiply(rounded<T>(act), ups[u]);
      sums[2] = add_squares(sums[2], product);
      store_chunk(out + place, product);
    }
  }
  block_sums(sums, scratch);
  if (threadIdx.x == 0) {
    if (args.gate_sumsq != nullptr) store_row_sum(args.gate_sumsq, row, args.step, args.phase, sums[0]);
    if (args.up_sumsq != nullptr) store_row_sum(args.up_sumsq, row, args.step, args.phase, sums[1]);
    if (args.out_sumsq != nullptr) store_row_sum(args.out_sumsq, row, args.step, args.phase, sums[2]);
  }
}

template <typename T, Activation kActivation>
void enqueue(const GatedActivationArgs& args, cudaStream_t stream) {
  // The fewest rounds that kMaxThreads allows, then the fewest warps that need no more rounds.
  const int64_t chunks = args.features / kVector;
  const int64_t rounds = (chunks + kUnroll<T> * kMaxThreads - 1) / (kUnroll<T> * kMaxThreads);
  const int64_t warps = (chunks + kUnroll<T> * rounds * kWarpSize - 1) / (kUnroll<T> * rounds * kWarpSize);
  for_grids(args.n_rows, 1, [&](int64_t row, dim3 grid) {
    launch(gated_activation_kernel<T, kActivation>, grid, warps * kWarpSize, stream, args, row);
  });
}

template <typename T>
void enqueue_by_activation(const GatedActivationArgs& args, cudaStream_t stream) {
  if (args.activation == Activation::kSilu) {
    enqueue<T, Activation::kSilu>(args, stream);
  } else {
    enqueue<T, Activation::kGeluTanh>(args, stream);
  }
}

}  // namespace

const char* launch_gated_activation(const GatedActivationArgs& args, void* stream) {
  return for_narrow_type(
      args.dtype, [&](auto value) { enqueue_by_activation<decltype(value)>(args, static_cast<cudaStream_t>(stream)); });
}

}  // namespace plop_ext
