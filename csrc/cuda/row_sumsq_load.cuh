// What one thread adds up of a row. A row is cut into chunks of 16 bytes; chunk c belongs to thread c % kGroup and
// there to accumulator (c / kGroup) % kUnroll, and its elements are added one after another. Every way to read a row
// keeps to that, so that all give bitwise identical sums.
#pragma once

#include <type_traits>

#include "../row_sumsq.h"
#include "elements.cuh"
#include "reduce.cuh"

namespace plop_ext {

// Chunks of a round: independent 16-byte loads in flight per thread, each with an accumulator of its own.
constexpr int kUnroll = 4;
// Rounds that a multi-round kernel loads before it uses the first chunk.
constexpr int kRounds = 4;

enum class Access {
  kElementwise,  // any stride and alignment
  kVectorized,   // 16-byte loads, one round in flight
  kMultiRound,   // 16-byte loads, kRounds rounds in flight
};

// In place of a type of bias: nothing is subtracted.
struct NoBias {};

// One variant of the kernels: what it reads, by how many threads per row, and how.
template <typename ElementType, typename BiasType, int kThreadsPerRow, Access kAccessToRows>
struct RowTraits {
  using Element = ElementType;
  using Bias = BiasType;
  using Sum = std::conditional_t<std::is_same_v<Element, double>, double, float>;
  static constexpr bool kHasBias = !std::is_same_v<Bias, NoBias>;
  static constexpr int kGroup = kThreadsPerRow;
  static constexpr Access kAccess = kAccessToRows;
  static constexpr int kSize = kVectorBytes / sizeof(Element);  // elements of a chunk
};

// A chunk of elements that lie `stride` apart. Those past the row's end are zero and add nothing.
template <int kSize, typename T>
__device__ __forceinline__ Chunk<T, kSize> load_elements(const T* __restrict__ p, int64_t k0, int64_t n,
                                                         int64_t stride) {
  Chunk<T, kSize> chunk;
#pragma unroll
  for (int j = 0; j < kSize; ++j) chunk.values[j] = k0 + j < n ? p[(k0 + j) * stride] : T(0.0f);
  return chunk;
}

// Adds kChunks chunks, of which this thread's first is `c`. Unless they are kWhole, chunks from `end` on count as zero.
template <class Traits, int kChunks, bool kWhole>
__device__ __forceinline__ void add_chunks(typename Traits::Sum (&sums)[kUnroll],
                                           const typename Traits::Element* __restrict__ row,
                                           const typename Traits::Bias* __restrict__ bias, int64_t c, int64_t end) {
  constexpr int kSize = Traits::kSize;
  constexpr int kGroup = Traits::kGroup;
  // Capped, so that 32 bits are enough for the comparisons.
  const int left = kWhole ? 0 : static_cast<int>(min(end - c, int64_t{kChunks * kGroup}));
  Chunk<typename Traits::Element, kSize> chunks[kChunks];
  // Predicated, not branched: all loads are in flight before the first is used.
#pragma unroll
  for (int u = 0; u < kChunks; ++u) {
    chunks[u] = {};
    if (kWhole || u * kGroup < left) chunks[u] = load_chunk<kSize>(row + (c + u * kGroup) * kSize);
  }
#pragma unroll
  for (int u = 0; u < kChunks; ++u) {
    auto& sum = sums[u % kUnroll];
    if constexpr (Traits::kHasBias) {
      Chunk<typename Traits::Bias, kSize> shift = {};
      if (kWhole || u * kGroup < left) shift = load_chunk<kSize>(bias + (c + u * kGroup) * kSize);
      sum = add_squares(sum, chunks[u], shift);
    } else {
      sum = add_squares(sum, chunks[u]);
    }
  }
}

// Adds the elements behind the last whole chunk, one at a time: a whole chunk of them would take registers that the
// rounds need.
template <class Traits>
__device__ __forceinline__ void add_tail(typename Traits::Sum (&sums)[kUnroll],
                                         const typename Traits::Element* __restrict__ row,
                                         const typename Traits::Bias* __restrict__ bias, int64_t n, int lane) {
  const int64_t end = n / Traits::kSize;
  if (n % Traits::kSize == 0 || lane != static_cast<int>(end % Traits::kGroup)) return;
  const int accumulator = static_cast<int>(end / Traits::kGroup) % kUnroll;
#pragma unroll 1
  for (int64_t k = end * Traits::kSize; k < n; ++k) {
    typename Traits::Sum v = load_value(row[k]);
    if constexpr (Traits::kHasBias) v -= static_cast<typename Traits::Sum>(load_value(bias[k]));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u == accumulator) sums[u] = fma(v, v, sums[u]);
    }
  }
}

// A row whose chunks are aligned: whole rounds, then the last one, then the tail.
template <class Traits>
__device__ __forceinline__ void add_vectorized(typename Traits::Sum (&sums)[kUnroll],
                                               const typename Traits::Element* __restrict__ row,
                                               const typename Traits::Bias* __restrict__ bias, int64_t n, int lane) {
  constexpr bool kMultiRound = Traits::kAccess == Access::kMultiRound;
  constexpr int kChunks = kMultiRound ? kRounds * kUnroll : kUnroll;
  // With a bias, twice as many predicated chunks would exceed the registers.
  constexpr int kPartial = kMultiRound && Traits::kHasBias ? kChunks / 2 : kChunks;
  constexpr int kGroup = Traits::kGroup;
  constexpr int64_t kRound = kUnroll * kGroup;
  const int64_t end = n / Traits::kSize;
  int64_t first = 0;
  for (; first + kChunks * kGroup <= end; first += kChunks * kGroup) {
    add_chunks<Traits, kChunks, true>(sums, row, bias, first + lane, end);
  }
  if constexpr (kMultiRound) {
    for (; first + kRound < end; first += kPartial * kGroup) {
      add_chunks<Traits, kPartial, false>(sums, row, bias, first + lane, end);
    }
  }
  // Narrow rows are bound by instructions, and a chunk of zeros costs as many as any other.
  if (first + kRound / 2 < end) {
    add_chunks<Traits, kUnroll, false>(sums, row, bias, first + lane, end);
  } else if (first < end) {
    add_chunks<Traits, kUnroll / 2, false>(sums, row, bias, first + lane, end);
  }
  add_tail<Traits>(sums, row, bias, n, lane);
}

// A row of any stride and alignment.
template <class Traits>
__device__ __forceinline__ void add_elementwise(typename Traits::Sum (&sums)[kUnroll],
                                                const typename Traits::Element* __restrict__ row,
                                                const typename Traits::Bias* __restrict__ bias, int64_t n,
                                                int64_t stride, int lane) {
  constexpr int kSize = Traits::kSize;
  for (int64_t c = lane; c * kSize < n; c += kUnroll * Traits::kGroup) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t k0 = (c + u * Traits::kGroup) * kSize;
      if constexpr (Traits::kHasBias) {
        const auto shift = load_elements<kSize>(bias, k0, n, 1);
        sums[u] = add_squares(sums[u], load_elements<kSize>(row, k0, n, stride), shift);
      } else {
        sums[u] = add_squares(sums[u], load_elements<kSize>(row, k0, n, stride));
      }
    }
  }
}

// This thread's share of the sum of the `r`-th row read; `lane` is its place among the threads of the row.
template <class Traits>
__device__ __forceinline__ typename Traits::Sum row_share(const RowSumsqArgs& args, int64_t r, int lane) {
  const auto* __restrict__ x = static_cast<const typename Traits::Element*>(args.x);
  const auto* __restrict__ bias = static_cast<const typename Traits::Bias*>(args.bias);
  const int64_t row = args.phase + r * args.step;
  // The entry point merges the two row axes where it can; then `inner` covers all rows and no division is needed.
  const auto* p = row < args.inner ? x + row * args.row_stride
                                   : x + (row / args.inner) * args.outer_stride + (row % args.inner) * args.row_stride;
  if (Traits::kHasBias && args.bias_stride != 0) bias += (row % args.inner) * args.bias_stride;
  typename Traits::Sum sums[kUnroll] = {};
  if constexpr (Traits::kAccess == Access::kElementwise) {
    add_elementwise<Traits>(sums, p, bias, args.in_features, args.feature_stride, lane);
  } else {
    add_vectorized<Traits>(sums, p, bias, args.in_features, lane);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace plop_ext
