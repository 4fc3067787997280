// Sum of squares per row: a group of 4, 8 or 32 threads or a whole block per row, by K alone. A row is cut into chunks
// of 16 bytes; chunk c belongs to thread c % group and there to accumulator (c / group) % kUnroll, whether it is read
// by one 16-byte load or element by element, so both paths give the same bits. Reads each activation once and writes 4
// bytes a row: bound by memory bandwidth.
#include "../row_sumsq.h"
#include "elements.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace plop_ext {
namespace {

constexpr int kThreads = 128;
// Independent 16-byte loads in flight per thread.
constexpr int kUnroll = 4;
// A deep kernel loads so many rounds of kUnroll chunks before it uses the first. Its accumulators get the same chunks
// in the same order, so that a row has the same bits.
constexpr int kDeepRounds = 4;
// Chunks of one such load by a warp.
constexpr int64_t kDeepRow = kDeepRounds * kUnroll * kWarpSize;
// So many rows or fewer, of any width, fill the memory's pipes by deep loads only. On an H200 32768 rows of 512 and
// 1792 chunks (4096 and 14336 features in bf16) still take 1 % less time by them, and rows of 128 chunks 11 % more.
constexpr int64_t kFewRows = 4096;
// Rows of more chunks take a warp ...
constexpr int64_t kWidestGroupRow = 16 * kUnroll;
// ... and of more than these a whole block, or one warp would work on while the others are done.
constexpr int64_t kWidestWarpRow = 4096;

template <typename T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

template <typename T>
constexpr int kChunk = kVectorBytes / sizeof(T);

// Element by element; those past the row's end are zero and add nothing.
template <typename T, int kSize>
__device__ __forceinline__ Chunk<T, kSize> load_elements(const T* __restrict__ p, int64_t k0, int64_t n,
                                                         int64_t stride) {
  Chunk<T, kSize> chunk;
#pragma unroll
  for (int j = 0; j < kSize; ++j) chunk.values[j] = k0 + j < n ? p[(k0 + j) * stride] : T(0.0f);
  return chunk;
}

// Adds kChunks chunks, of which this thread's first is `c`, in the order of the accumulators. Unless they are kWhole,
// chunks from `end` on count as zero.
template <int kChunks, bool kWhole, int kGroup, bool kBias, typename T, typename B, typename Sum>
__device__ __forceinline__ void add_chunks(Sum (&sums)[kUnroll], const T* __restrict__ row, const B* __restrict__ bias,
                                           int64_t c, int64_t end) {
  constexpr int kSize = kChunk<T>;
  // Capped, so that 32 bits are enough for the comparisons.
  const int left = kWhole ? 0 : static_cast<int>(min(end - c, int64_t{kChunks * kGroup}));
  Chunk<T, kSize> chunks[kChunks];
  // Predicated, not branched: all loads are in flight before the first is used.
#pragma unroll
  for (int u = 0; u < kChunks; ++u) {
    chunks[u] = {};
    if (kWhole || u * kGroup < left) chunks[u] = load_chunk<kSize>(row + (c + u * kGroup) * kSize);
  }
#pragma unroll
  for (int u = 0; u < kChunks; ++u) {
    Chunk<B, kSize> shift = {};
    if constexpr (kBias) {
      if (kWhole || u * kGroup < left) shift = load_chunk<kSize>(bias + (c + u * kGroup) * kSize);
    }
    if constexpr (kBias) {
      sums[u % kUnroll] = add_squares(sums[u % kUnroll], chunks[u], shift);
    } else {
      sums[u % kUnroll] = add_squares(sums[u % kUnroll], chunks[u]);
    }
  }
}

// A thread's sums over an aligned row.
template <int kGroup, bool kBias, bool kDeep, typename T, typename B, typename Sum>
__device__ __forceinline__ void add_vectors(Sum (&sums)[kUnroll], const T* __restrict__ row, const B* __restrict__ bias,
                                            int64_t n, int lane) {
  constexpr int kSize = kChunk<T>;
  constexpr int kChunks = kDeep ? kDeepRounds * kUnroll : kUnroll;
  // With a bias beside them so many predicated chunks are more than the registers hold.
  constexpr int kPartial = kDeep && kBias ? kChunks / 2 : kChunks;
  constexpr int64_t kRound = kUnroll * kGroup;
  const int64_t end = n / kSize;
  int64_t first = 0;
  for (; first + kChunks * kGroup <= end; first += kChunks * kGroup) {
    add_chunks<kChunks, true, kGroup, kBias>(sums, row, bias, first + lane, end);
  }
  if constexpr (kDeep) {
    for (; first + kRound < end; first += kPartial * kGroup) {
      add_chunks<kPartial, false, kGroup, kBias>(sums, row, bias, first + lane, end);
    }
  }
  // Narrow rows are bound by instructions, and chunks of zeros take as many.
  if (first + kRound / 2 < end) {
    add_chunks<kUnroll, false, kGroup, kBias>(sums, row, bias, first + lane, end);
  } else if (first < end) {
    add_chunks<kUnroll / 2, false, kGroup, kBias>(sums, row, bias, first + lane, end);
  }
  if (n % kSize != 0 && lane == static_cast<int>(end % kGroup)) {
    const int accumulator = static_cast<int>(end / kGroup) % kUnroll;
    // One element at a time takes no registers that the rounds would miss.
#pragma unroll 1
    for (int64_t k = end * kSize; k < n; ++k) {
      Sum v = load_value(row[k]);
      if constexpr (kBias) v -= static_cast<Sum>(load_value(bias[k]));
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (u == accumulator) sums[u] = fma(v, v, sums[u]);
      }
    }
  }
}

template <typename T, typename B, int kGroup, bool kVector, bool kBias, bool kDeep>
__device__ __forceinline__ typename SumOf<T>::type lane_sumsq(const T* __restrict__ row, const B* __restrict__ bias,
                                                              int64_t n, int64_t stride, int lane) {
  constexpr int kSize = kChunk<T>;
  typename SumOf<T>::type sums[kUnroll] = {};
  if constexpr (kVector) {
    add_vectors<kGroup, kBias, kDeep>(sums, row, bias, n, lane);
  } else {
    Chunk<B, kSize> shift = {};
    for (int64_t c = lane; c * kSize < n; c += kUnroll * kGroup) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t k0 = (c + u * kGroup) * kSize;
        if constexpr (kBias) shift = load_elements<B, kSize>(bias, k0, n, 1);
        const Chunk<T, kSize> chunk = load_elements<T, kSize>(row, k0, n, stride);
        sums[u] = kBias ? add_squares(sums[u], chunk, shift) : add_squares(sums[u], chunk);
      }
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// 16 blocks a multiprocessor need at most 32 registers a thread: 3 % more bandwidth at K = 4096 in bf16 on an H200. The
// other variants would spill.
template <typename T, int kGroup, bool kVector, bool kBias, bool kDeep>
constexpr int kMinBlocks = kGroup <= kWarpSize && kVector && !kBias && !kDeep && sizeof(T) < sizeof(float) ? 16 : 1;

// This thread's share of the `r`-th row read.
template <typename T, typename B, int kGroup, bool kVector, bool kBias, bool kDeep>
__device__ __forceinline__ typename SumOf<T>::type row_lane_sumsq(const RowSumsqArgs& args, int64_t r, int lane) {
  const T* __restrict__ x = static_cast<const T*>(args.x);
  const B* __restrict__ bias = static_cast<const B*>(args.bias);
  const int64_t row = args.phase + r * args.step;
  // The launcher merges the two row axes whenever it can; then `inner` covers all rows and no division is needed.
  const T* p = row < args.inner ? x + row * args.row_stride
                                : x + (row / args.inner) * args.outer_stride + (row % args.inner) * args.row_stride;
  const B* b = kBias && args.bias_stride != 0 ? bias + (row % args.inner) * args.bias_stride : bias;
  return lane_sumsq<T, B, kGroup, kVector, kBias, kDeep>(p, b, args.in_features, args.feature_stride, lane);
}

template <typename T, typename B, int kGroup, bool kVector, bool kBias, bool kDeep>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T, kGroup, kVector, kBias, kDeep>)
    row_sumsq_kernel(const RowSumsqArgs args) {
  using Sum = typename SumOf<T>::type;
  constexpr int kRows = kThreads / kGroup;
  __shared__ Sum scratch[kThreads / kWarpSize];
  await_previous_kernel();

  Sum* __restrict__ out = static_cast<Sum*>(args.out);
  const int lane = threadIdx.x % kGroup;
  const int64_t blocks = (args.n_rows + kRows - 1) / kRows;

  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t r = block * kRows + threadIdx.x / kGroup;
    const bool active = r < args.n_rows;
    Sum sum = 0;
    if (active) sum = row_lane_sumsq<T, B, kGroup, kVector, kBias, kDeep>(args, r, lane);
    if (kGroup == kThreads) {
      sum = block_sum<kThreads>(sum, scratch);
    } else {
      sum = group_sum < kGroup<kWarpSize ? kGroup : kWarpSize>(sum);
    }
    if (active && lane == 0) out[r] = sum;
  }
}

constexpr int kWarpRows = kThreads / kWarpSize;
// The compiler moves loads behind uses to save registers that nobody needs, unless it is told how many there are.
template <bool kBias>
constexpr int kPairBlocks = kBias ? 4 : 5;

// The deep warp-per-row kernel over the aligned rows of two tensors, as many of one as of the other: the first half of
// the grid reads the first part, which has no bias.
template <typename T, bool kBias>
__global__ void __launch_bounds__(kThreads, kPairBlocks<kBias>)
    row_sumsq_pair_kernel(const __grid_constant__ RowSumsqPair pair) {
  await_previous_kernel();
  const unsigned blocks = gridDim.x / 2;
  const int part = blockIdx.x < blocks ? 0 : 1;
  const int64_t block = blockIdx.x - part * blocks;
  const int64_t r = block * kWarpRows + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const RowSumsqArgs& args = pair.parts[part];
  if (r >= args.n_rows) return;  // a whole warp
  float sum;
  if (kBias && part == 1) {
    sum = row_lane_sumsq<T, T, kWarpSize, true, kBias, true>(args, r, lane);
  } else {
    sum = row_lane_sumsq<T, T, kWarpSize, true, false, true>(args, r, lane);
  }
  sum = group_sum<kWarpSize>(sum);
  if (lane == 0) static_cast<float*>(args.out)[r] = sum;
}

template <typename T, typename B, int kGroup, bool kVector, bool kBias, bool kDeep = false>
void enqueue(const RowSumsqArgs& args, cudaStream_t stream) {
  constexpr int64_t kRows = kThreads / kGroup;
  const int64_t blocks = (args.n_rows + kRows - 1) / kRows;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid));
  launch(row_sumsq_kernel<T, B, kGroup, kVector, kBias, kDeep>, grid, kThreads, stream, args);
}

template <typename T>
int64_t row_chunks(const RowSumsqArgs& args) {
  return (args.in_features + kChunk<T> - 1) / kChunk<T>;
}

template <typename T, typename B, bool kVector, bool kBias>
void enqueue_by_width(const RowSumsqArgs& args, cudaStream_t stream) {
  const int64_t chunks = row_chunks<T>(args);
  if (chunks <= 4 * kUnroll) {
    enqueue<T, B, 4, kVector, kBias>(args, stream);
  } else if (chunks <= kWidestGroupRow) {
    enqueue<T, B, 8, kVector, kBias>(args, stream);
  } else if (chunks <= kWidestWarpRow) {
    if constexpr (kVector && sizeof(T) <= sizeof(float) && sizeof(B) == sizeof(T)) {
      if (args.n_rows <= kFewRows || chunks >= kDeepRow) {
        enqueue<T, B, kWarpSize, kVector, kBias, true>(args, stream);
        return;
      }
    }
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

template <typename T>
bool takes_aligned_warps(const RowSumsqArgs& args) {
  const int64_t chunks = row_chunks<T>(args);
  return chunks > kWidestGroupRow && chunks <= kWidestWarpRow && rows_are_aligned<T>(args);
}

// Enqueues one launch for both, or nothing and returns false. One launch is faster with any number of rows, since the
// second part fills the machine while the first runs out: by 2 to 6 % with 8192 to 32768 rows of bf16. A bias takes
// that away again where it is subtracted from many narrow rows (5 to 9 % slower with 32768 rows of 128 and 384 chunks).
template <typename T>
bool enqueue_pair(const RowSumsqPair& pair, cudaStream_t stream) {
  const RowSumsqArgs& first = pair.parts[0];
  const RowSumsqArgs& second = pair.parts[1];
  const bool same_bias = second.bias == nullptr || second.bias_dtype == second.dtype;
  const bool subtracts_from_narrow_rows = second.bias != nullptr && row_chunks<T>(second) < kDeepRow;
  const int64_t blocks = (first.n_rows + kWarpRows - 1) / kWarpRows * 2;
  if (!same_bias || blocks > kMaxGrid) return false;
  if (subtracts_from_narrow_rows && first.n_rows > kFewRows) return false;
  if (!takes_aligned_warps<T>(first) || !takes_aligned_warps<T>(second)) return false;
  const dim3 grid(static_cast<unsigned>(blocks));
  if (second.bias == nullptr) {
    launch(row_sumsq_pair_kernel<T, false>, grid, kThreads, stream, pair);
  } else {
    launch(row_sumsq_pair_kernel<T, true>, grid, kThreads, stream, pair);
  }
  return true;
}

}  // namespace

const char* launch_row_sumsq(const RowSumsqArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.dtype == DType::kFloat64) {
    enqueue_by_bias<double>(args, cuda_stream);
    return launch_error();
  }
  return for_narrow_type(args.dtype, [&](auto value) { enqueue_by_bias<decltype(value)>(args, cuda_stream); });
}

const char* launch_row_sumsq_pair(const RowSumsqPair& pair, void* stream) {
  if (pair.parts[0].dtype != DType::kFloat64) {
    bool together = false;
    const char* error = for_narrow_type(pair.parts[0].dtype, [&](auto value) {
      together = enqueue_pair<decltype(value)>(pair, static_cast<cudaStream_t>(stream));
    });
    if (together || error != nullptr) return error;
  }
  const char* error = launch_row_sumsq(pair.parts[0], stream);
  return error != nullptr ? error : launch_row_sumsq(pair.parts[1], stream);
}

}  // namespace plop_ext
