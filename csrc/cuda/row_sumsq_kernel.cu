// Sum of squares per row: a group of 4, 8 or 32 threads or a whole block per row, by K alone (row_sumsq_load.cuh: which
// thread adds what). Reads each activation once and writes 4 bytes a row: bound by memory bandwidth.
#include <limits>

#include "../row_sumsq.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "row_sumsq_load.cuh"

namespace plop_ext {
namespace {

constexpr int kThreads = 128;

// Widths in chunks: a row up to the first takes 4 threads, ...
constexpr int64_t kWidestOf4 = 4 * kUnroll;
// ... up to the next one 8 ...
constexpr int64_t kWidestOf8 = 16 * kUnroll;
// ... and up to this one a warp. A wider row takes a whole block: one warp would still be at work when others are done.
constexpr int64_t kWidestOfWarp = 4096;

// Width in chunks of what a warp loads at once in a multi-round kernel.
constexpr int64_t kMultiRoundRow = kRounds * kUnroll * kWarpSize;
// Up to this many rows only multi-round loads saturate memory. At 32768 rows (H200, bf16) they are 1 % faster at
// K = 4096 and 14336, 11 % slower at K = 1024: with more rows than this they serve rows from kMultiRoundRow on.
constexpr int64_t kFewRows = 4096;

// 16 blocks a multiprocessor need at most 32 registers a thread: 3 % more bandwidth at K = 4096 in bf16 on an H200. The
// other variants would spill.
template <class Traits>
constexpr int kMinBlocks = Traits::kGroup <= kWarpSize && Traits::kAccess == Access::kVectorized && !Traits::kHasBias &&
                                   sizeof(typename Traits::Element) < sizeof(float)
                               ? 16
                               : 1;

template <class Traits>
__global__ void __launch_bounds__(kThreads, kMinBlocks<Traits>) row_sumsq_kernel(const RowSumsqArgs args) {
  using Sum = typename Traits::Sum;
  constexpr int kGroup = Traits::kGroup;
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
    if (active) sum = row_share<Traits>(args, r, lane);
    if constexpr (kGroup == kThreads) {
      sum = block_sum<kThreads>(sum, scratch);
    } else {
      sum = group_sum<kGroup>(sum);
    }
    if (active && lane == 0) out[r] = sum;
  }
}

// The compiler delays loads to save registers that are free anyway, unless it is told how many there are.
template <class Traits>
constexpr int kPairBlocks = Traits::kHasBias ? 4 : 5;

// The multi-round kernel with a warp per row, over two tensors: the first half of the grid reads the first one, which
// has no bias.
template <class Traits>
__global__ void __launch_bounds__(kThreads, kPairBlocks<Traits>)
    row_sumsq_pair_kernel(const __grid_constant__ RowSumsqPair pair) {
  using WithoutBias = RowTraits<typename Traits::Element, NoBias, Traits::kGroup, Traits::kAccess>;
  await_previous_kernel();
  const unsigned blocks = gridDim.x / 2;
  const int part = blockIdx.x < blocks ? 0 : 1;
  const int64_t block = blockIdx.x - part * blocks;
  const int64_t r = block * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const RowSumsqArgs& args = pair.parts[part];
  if (r >= args.n_rows) return;  // a whole warp
  float sum;
  if (Traits::kHasBias && part == 1) {
    sum = row_share<Traits>(args, r, lane);
  } else {
    sum = row_share<WithoutBias>(args, r, lane);
  }
  sum = group_sum<kWarpSize>(sum);
  if (lane == 0) static_cast<float*>(args.out)[r] = sum;
}

// --- which variant serves a call: its types, then its alignment, then its width ---

template <class Traits>
void enqueue(const RowSumsqArgs& args, cudaStream_t stream) {
  constexpr int64_t kRows = kThreads / Traits::kGroup;
  const int64_t blocks = (args.n_rows + kRows - 1) / kRows;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid));
  launch(row_sumsq_kernel<Traits>, grid, kThreads, stream, args);
}

struct Variant {
  int64_t widest_row;  // in chunks
  void (*enqueue)(const RowSumsqArgs&, cudaStream_t);
};

template <typename T, typename B, Access kAccess>
constexpr Variant kVariants[] = {
    {kWidestOf4, enqueue<RowTraits<T, B, 4, kAccess>>},
    {kWidestOf8, enqueue<RowTraits<T, B, 8, kAccess>>},
    {kWidestOfWarp, enqueue<RowTraits<T, B, kWarpSize, kAccess>>},
    {std::numeric_limits<int64_t>::max(), enqueue<RowTraits<T, B, kThreads, kAccess>>},
};

template <typename T>
int64_t row_chunks(const RowSumsqArgs& args) {
  constexpr int64_t kSize = kVectorBytes / sizeof(T);
  return (args.in_features + kSize - 1) / kSize;
}

template <typename T>
bool takes_a_warp(const RowSumsqArgs& args) {
  const int64_t chunks = row_chunks<T>(args);
  return chunks > kWidestOf8 && chunks <= kWidestOfWarp;
}

template <typename T>
bool rows_are_aligned(const RowSumsqArgs& args) {
  constexpr int64_t kSize = kVectorBytes / sizeof(T);
  return args.feature_stride == 1 && reinterpret_cast<uintptr_t>(args.x) % kVectorBytes == 0 &&
         reinterpret_cast<uintptr_t>(args.bias) % kVectorBytes == 0 && args.bias_stride % kSize == 0 &&
         args.row_stride % kSize == 0 && args.outer_stride % kSize == 0;
}

// Float64, and a float32 bias beside 16-bit elements, have no multi-round kernel.
template <typename T, typename B>
constexpr bool kHasMultiRound = sizeof(T) <= sizeof(float) && (std::is_same_v<B, NoBias> || sizeof(B) == sizeof(T));

template <typename T, typename B, Access kAccess>
void enqueue_by_width(const RowSumsqArgs& args, cudaStream_t stream) {
  const int64_t chunks = row_chunks<T>(args);
  if constexpr (kAccess == Access::kVectorized && kHasMultiRound<T, B>) {
    if (takes_a_warp<T>(args) && (args.n_rows <= kFewRows || chunks >= kMultiRoundRow)) {
      return enqueue<RowTraits<T, B, kWarpSize, Access::kMultiRound>>(args, stream);
    }
  }
  for (const Variant& variant : kVariants<T, B, kAccess>) {
    if (chunks <= variant.widest_row) return variant.enqueue(args, stream);
  }
}

template <typename T, typename B>
void enqueue_by_alignment(const RowSumsqArgs& args, cudaStream_t stream) {
  if (rows_are_aligned<T>(args)) {
    enqueue_by_width<T, B, Access::kVectorized>(args, stream);
  } else {
    enqueue_by_width<T, B, Access::kElementwise>(args, stream);
  }
}

template <typename T>
void enqueue_by_bias(const RowSumsqArgs& args, cudaStream_t stream) {
  if (args.bias == nullptr) {
    enqueue_by_alignment<T, NoBias>(args, stream);
  } else if (args.bias_dtype == args.dtype) {
    enqueue_by_alignment<T, T>(args, stream);
  } else if constexpr (sizeof(T) < sizeof(float)) {
    enqueue_by_alignment<T, float>(args, stream);
  }
}

// Enqueues one launch for both tensors, or nothing and returns false. One launch is faster with any number of rows,
// since the second part fills the device while the first runs out: by 2 to 6 % with 8192 to 32768 rows of bf16 on an
// H200. A bias that is subtracted from many narrow rows outweighs that: 5 to 9 % slower with 32768 rows of K = 1024 and
// 3072.
template <typename T>
bool enqueue_pair(const RowSumsqPair& pair, cudaStream_t stream) {
  constexpr int64_t kRows = kThreads / kWarpSize;
  const RowSumsqArgs& first = pair.parts[0];
  const RowSumsqArgs& second = pair.parts[1];
  const bool same_bias = second.bias == nullptr || second.bias_dtype == second.dtype;
  const bool subtracts_from_narrow_rows = second.bias != nullptr && row_chunks<T>(second) < kMultiRoundRow;
  const int64_t blocks = (first.n_rows + kRows - 1) / kRows * 2;
  if (!same_bias || blocks > kMaxGrid) return false;
  if (subtracts_from_narrow_rows && first.n_rows > kFewRows) return false;
  for (const RowSumsqArgs& args : pair.parts) {
    if (!takes_a_warp<T>(args) || !rows_are_aligned<T>(args)) return false;
  }
  const dim3 grid(static_cast<unsigned>(blocks));
  if (second.bias == nullptr) {
    launch(row_sumsq_pair_kernel<RowTraits<T, NoBias, kWarpSize, Access::kMultiRound>>, grid, kThreads, stream, pair);
  } else {
    launch(row_sumsq_pair_kernel<RowTraits<T, T, kWarpSize, Access::kMultiRound>>, grid, kThreads, stream, pair);
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
