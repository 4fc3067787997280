// Sum of squares per row: a group of 8 or 32 threads or a whole block per row, by K alone. A row is cut into chunks of
// 16 bytes; chunk c belongs to thread c % group and there to accumulator (c / group) % kUnroll, whether it is read by
// one 16-byte load or element by element, so both paths give the same bits. Reads each activation once and writes 4
// bytes a row: bound by memory bandwidth.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../row_sumsq.h"
#include "reduce.cuh"

namespace plop_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
// Independent 16-byte loads in flight per thread.
constexpr int kUnroll = 4;
constexpr int64_t kMaxGrid = int64_t{1} << 30;

template <typename T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

__device__ __forceinline__ float load_value(float v) { return v; }
__device__ __forceinline__ double load_value(double v) { return v; }
__device__ __forceinline__ float load_value(__half v) { return __half2float(v); }
__device__ __forceinline__ float load_value(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
constexpr int kChunk = kVectorBytes / sizeof(T);

template <typename T, int kSize>
struct alignas(kVectorBytes) Chunk {
  T values[kSize];
};

// Adds chunk `c` of a row to `sum`. The last chunk of a row may be partial.
template <typename T, typename B, bool kVector, bool kBias>
__device__ __forceinline__ typename SumOf<T>::type chunk_sumsq(const T* __restrict__ row, const B* __restrict__ bias,
                                                               int64_t c, int64_t n, int64_t stride,
                                                               typename SumOf<T>::type sum) {
  using Sum = typename SumOf<T>::type;
  constexpr int kSize = kChunk<T>;
  const int64_t k0 = c * kSize;
  if (kVector && k0 + kSize <= n) {
    const auto chunk = *reinterpret_cast<const Chunk<T, kSize>*>(row + k0);
    if constexpr (kBias) {
      const auto shift = *reinterpret_cast<const Chunk<B, kSize>*>(bias + k0);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const Sum v = load_value(chunk.values[j]) - static_cast<Sum>(load_value(shift.values[j]));
        sum += v * v;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const Sum v = load_value(chunk.values[j]);
        sum += v * v;
      }
    }
    return sum;
  }
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    if (k0 + j < n) {
      Sum v = load_value(row[(k0 + j) * stride]);
      if (kBias) v -= static_cast<Sum>(load_value(bias[k0 + j]));
      sum += v * v;
    }
  }
  return sum;
}

template <typename T, typename B, int kGroup, bool kVector, bool kBias>
__global__ void __launch_bounds__(kThreads) row_sumsq_kernel(const RowSumsqArgs args) {
  using Sum = typename SumOf<T>::type;
  constexpr int kRows = kThreads / kGroup;
  __shared__ Sum scratch[kThreads / kWarpSize];

  const T* __restrict__ x = static_cast<const T*>(args.x);
  const B* __restrict__ bias = static_cast<const B*>(args.bias);
  Sum* __restrict__ out = static_cast<Sum*>(args.out);
  const int64_t n = args.in_features;
  const int64_t chunks = (n + kChunk<T> - 1) / kChunk<T>;
  const int lane = threadIdx.x % kGroup;
  const int64_t blocks = (args.n_rows + kRows - 1) / kRows;

  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t r = block * kRows + threadIdx.x / kGroup;
    const bool active = r < args.n_rows;
    Sum sums[kUnroll] = {};
    if (active) {
      const int64_t row = args.phase + r * args.step;
      // The launcher merges the two row axes whenever it can; then `inner` covers all rows and no division is needed.
      const T* p = row < args.inner ? x + row * args.row_stride
                                    : x + (row / args.inner) * args.outer_stride + (row % args.inner) * args.row_stride;
      const B* b = kBias && args.bias_stride != 0 ? bias + (row % args.inner) * args.bias_stride : bias;
      int64_t c = lane;
      for (; c + (kUnroll - 1) * kGroup < chunks; c += kUnroll * kGroup) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          sums[u] = chunk_sumsq<T, B, kVector, kBias>(p, b, c + u * kGroup, n, args.feature_stride, sums[u]);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll - 1; ++u) {
        if (c + u * kGroup < chunks) {
          sums[u] = chunk_sumsq<T, B, kVector, kBias>(p, b, c + u * kGroup, n, args.feature_stride, sums[u]);
        }
      }
    }
    Sum sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    if (kGroup == kThreads) {
      sum = block_sum<kThreads>(sum, scratch);
    } else {
      sum = group_sum < kGroup<kWarpSize ? kGroup : kWarpSize>(sum);
    }
    if (active && lane == 0) out[r] = sum;
  }
}

template <typename T, typename B, int kGroup, bool kVector, bool kBias>
void enqueue(const RowSumsqArgs& args, cudaStream_t stream) {
  constexpr int64_t kRows = kThreads / kGroup;
  const int64_t blocks = (args.n_rows + kRows - 1) / kRows;
  const unsigned grid = static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid);
  row_sumsq_kernel<T, B, kGroup, kVector, kBias><<<grid, kThreads, 0, stream>>>(args);
}

template <typename T, typename B, bool kVector, bool kBias>
void enqueue_by_width(const RowSumsqArgs& args, cudaStream_t stream) {
  const int64_t chunks = (args.in_features + kChunk<T> - 1) / kChunk<T>;
  if (chunks <= 16) {
    enqueue<T, B, 8, kVector, kBias>(args, stream);
  } else if (chunks <= 4096) {
    enqueue<T, B, kWarpSize, kVector, kBias>(args, stream);
  } else {
    enqueue<T, B, kThreads, kVector, kBias>(args, stream);
  }
}

template <typename T>
bool rows_are_aligned(const RowSumsqArgs& args) {
  constexpr int64_t kSize = kChunk<T>;
  return args.feature_stride == 1 && reinterpret_cast<uintptr_t>(args.x) % kVectorBytes == 0 &&
         reinterpret_cast<uintptr_t>(args.bias) % kVectorBytes == 0 && args.bias_stride % kSize == 0 &&
         args.row_stride % kSize == 0 && args.outer_stride % kSize == 0;
}

template <typename T, typename B, bool kBias>
void enqueue_by_alignment(const RowSumsqArgs& args, cudaStream_t stream) {
  if (rows_are_aligned<T>(args)) {
    enqueue_by_width<T, B, true, kBias>(args, stream);
  } else {
    enqueue_by_width<T, B, false, kBias>(args, stream);
  }
}

template <typename T>
void enqueue_by_bias(const RowSumsqArgs& args, cudaStream_t stream) {
  if (args.bias == nullptr) {
    enqueue_by_alignment<T, T, false>(args, stream);
  } else if (args.bias_dtype == args.dtype) {
    enqueue_by_alignment<T, T, true>(args, stream);
  } else if constexpr (sizeof(T) < sizeof(float)) {
    enqueue_by_alignment<T, float, true>(args, stream);
  }
}

}  // namespace

const char* launch_row_sumsq(const RowSumsqArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::kFloat32:
      enqueue_by_bias<float>(args, cuda_stream);
      break;
    case DType::kFloat64:
      enqueue_by_bias<double>(args, cuda_stream);
      break;
    case DType::kFloat16:
      enqueue_by_bias<__half>(args, cuda_stream);
      break;
    case DType::kBFloat16:
      enqueue_by_bias<__nv_bfloat16>(args, cuda_stream);
      break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace plop_ext
