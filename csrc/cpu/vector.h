// What the CPU kernels share: element types with branch-free loads and stores, and sums of squares in fixed lanes. All
// of it is inlined into functions marked PLOP_VECTOR_CLONES, whose loops the compiler vectorizes once per instruction
// set. The loader chooses the set; results are bitwise identical for all.
#pragma once

#include <cmath>
#include <cstring>

#include "../types.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PLOP_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PLOP_VECTOR_CLONES
#endif

#define PLOP_INLINE inline __attribute__((always_inline))

namespace plop_ext {

PLOP_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

PLOP_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct Float32 {
  using Storage = float;
  using Sum = float;
  static PLOP_INLINE float load(float v) { return v; }
  static PLOP_INLINE float round(float v) { return v; }
  static PLOP_INLINE float store(float v) { return v; }
};

struct Float64 {
  using Storage = double;
  using Sum = double;
  static PLOP_INLINE double load(double v) { return v; }
};

struct BFloat16 {
  using Storage = uint16_t;
  using Sum = float;
  static PLOP_INLINE float load(uint16_t v) { return bits_to_float(static_cast<uint32_t>(v) << 16); }
  static PLOP_INLINE float round(float v) {
    const uint32_t bits = float_to_bits(v);
    const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return bits_to_float((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : nearest_even);
  }
  static PLOP_INLINE uint16_t store(float v) { return static_cast<uint16_t>(float_to_bits(round(v)) >> 16); }
};

struct Float16 {
  using Storage = uint16_t;
  using Sum = float;
  // Rebiases the exponent by a multiplication, which is exact and handles subnormals; infinities and NaNs get the
  // all-ones exponent back.
  static PLOP_INLINE float load(uint16_t v) {
    const uint32_t sign = (v & 0x8000u) << 16;
    const uint32_t magnitude = (v & 0x7fffu) << 13;
    const float finite = bits_to_float(magnitude) * 0x1p112f;
    const uint32_t special = (v & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return bits_to_float(float_to_bits(finite) | special | sign);
  }
  // A number 2^13 times as large has the last place of a half as its own, so adding it rounds.
  static PLOP_INLINE float round(float v) {
    const uint32_t power = float_to_bits(v) & 0x7f800000u;
    const float large = bits_to_float((power < (113u << 23) ? 113u << 23 : power) + (13u << 23) + 0x400000u);
    const float nearest_even = (v + large) - large;
    const float finite = nearest_even > 65504.0f ? HUGE_VALF : nearest_even;
    return finite < -65504.0f ? -HUGE_VALF : finite;
  }
  static PLOP_INLINE uint16_t store(float v) {
    const uint32_t bits = float_to_bits(v);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // The last bit of a sum with 0.5 weighs as much as that of a subnormal half: the addition rounds.
    const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return static_cast<uint16_t>((magnitude < (143u << 23) ? finite : special) | ((bits >> 16) & 0x8000u));
  }
};

// 64 float lanes are four 512-bit or eight 256-bit registers: enough independent sums to hide the latency of an
// addition.
constexpr int64_t kLanes = 64;

// Rows are worked on in blocks: three of float32 fit a level 1 cache of 32 KiB.
constexpr int64_t kBlock = 1024;
static_assert(kBlock % kLanes == 0, "a block that is not the last of its row ends at the last lane");

// Adds the upper half of the lanes to the lower half until one is left, here lanes[0].
template <int64_t kWidth, typename Sum>
PLOP_INLINE void fold(Sum* lanes) {
  for (int64_t lane = 0; lane < kWidth; ++lane) lanes[lane] += lanes[lane + kWidth];
  if constexpr (kWidth > 1) fold<kWidth / 2>(lanes);
}

// Sum of squares in fixed lanes: element k of the row is added to lane k % kLanes, so the compiler can keep the lanes
// in vector registers without reordering any sum. All parts of a row but the last are a multiple of kLanes long.
template <typename Element>
struct LaneSum {
  using Sum = typename Element::Sum;
  Sum lanes[kLanes] = {};

  // Adds (x[k * stride] - bias[k])^2 for k < n.
  template <typename Bias, bool kBias>
  PLOP_INLINE void add_shifted(const typename Element::Storage* x, const typename Bias::Storage* bias, int64_t n,
                               int64_t stride) {
    int64_t k = 0;
    if (stride == 1) {
      for (; k + kLanes <= n; k += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          Sum v = Element::load(x[k + lane]);
          if (kBias) v -= Bias::load(bias[k + lane]);
          lanes[lane] += v * v;
        }
      }
    }
    for (; k < n; ++k) {
      Sum v = Element::load(x[k * stride]);
      if (kBias) v -= Bias::load(bias[k]);
      lanes[k % kLanes] += v * v;
    }
  }

  template <typename Bias = Element>
  PLOP_INLINE void add(const typename Element::Storage* x, const typename Bias::Storage* bias, int64_t n,
                       int64_t stride = 1) {
    if (bias) {
      add_shifted<Bias, true>(x, bias, n, stride);
    } else {
      add_shifted<Bias, false>(x, nullptr, n, stride);
    }
  }

  PLOP_INLINE Sum total() {
    fold<kLanes / 2>(lanes);
    return lanes[0];
  }
};

// The sum of squares of a whole row.
template <typename Element, typename Bias = Element>
PLOP_INLINE typename Element::Sum sumsq(const typename Element::Storage* x, const typename Bias::Storage* bias,
                                        int64_t n, int64_t stride = 1) {
  LaneSum<Element> sum;
  sum.template add<Bias>(x, bias, n, stride);
  return sum.total();
}

// The index of the sum of `row`, where every `step`-th row from `phase` on has one; -1: it has none.
PLOP_INLINE int64_t sum_slot(int64_t row, int64_t step, int64_t phase) {
  return row >= phase && (row - phase) % step == 0 ? (row - phase) / step : -1;
}

}  // namespace plop_ext
