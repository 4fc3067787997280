// Sum of squares per row on the CPU. Element k is added to accumulator k % kLanes, so the compiler can keep the
// accumulators in vector registers without reordering any sum; the instruction set is chosen when the library is
// loaded.
#include <cstring>

#include "../row_sumsq.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PLOP_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PLOP_VECTOR_CLONES
#endif

#define PLOP_INLINE inline __attribute__((always_inline))

namespace plop_ext {
namespace {

// 64 float lanes are four 512-bit or eight 256-bit registers: enough independent sums to hide the latency of an FMA.
constexpr int64_t kLanes = 64;

PLOP_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct Float32 {
  using Storage = float;
  using Sum = float;
  static PLOP_INLINE float load(float v) { return v; }
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
};

struct Float16 {
  using Storage = uint16_t;
  using Sum = float;
  // Branch-free so that it vectorises: rebias the exponent by a multiplication, which is exact and handles subnormals;
  // infinities and NaNs get the all-ones exponent back.
  static PLOP_INLINE float load(uint16_t v) {
    const uint32_t sign = (v & 0x8000u) << 16;
    const uint32_t magnitude = (v & 0x7fffu) << 13;
    const float finite = bits_to_float(magnitude) * 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &finite, sizeof(bits));
    const uint32_t special = (v & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return bits_to_float(bits | special | sign);
  }
};

template <typename Element, bool kBias>
PLOP_INLINE typename Element::Sum sumsq_row(const typename Element::Storage* x, const typename Element::Sum* bias,
                                            int64_t n, int64_t stride) {
  using Sum = typename Element::Sum;
  Sum lanes[kLanes] = {};
  int64_t k = 0;
  if (stride == 1) {
    for (; k + kLanes <= n; k += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        Sum v = Element::load(x[k + lane]);
        if (kBias) v -= bias[k + lane];
        lanes[lane] += v * v;
      }
    }
  }
  for (; k < n; ++k) {
    Sum v = Element::load(x[k * stride]);
    if (kBias) v -= bias[k];
    lanes[k % kLanes] += v * v;
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <typename Element>
PLOP_INLINE void sumsq_rows(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  using Sum = typename Element::Sum;
  const auto* x = static_cast<const typename Element::Storage*>(args.x);
  const auto* bias = static_cast<const Sum*>(args.bias);
  auto* out = static_cast<Sum*>(args.out);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t row = args.phase + r * args.step;
    const auto* p = x + (row / args.inner) * args.outer_stride + (row % args.inner) * args.row_stride;
    const auto* shift = bias ? bias + (row % args.inner) * args.bias_stride : nullptr;
    out[r] = bias ? sumsq_row<Element, true>(p, shift, args.in_features, args.feature_stride)
                  : sumsq_row<Element, false>(p, nullptr, args.in_features, args.feature_stride);
  }
}

PLOP_VECTOR_CLONES void sumsq_rows_float32(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  sumsq_rows<Float32>(args, begin, end);
}
PLOP_VECTOR_CLONES void sumsq_rows_float64(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  sumsq_rows<Float64>(args, begin, end);
}
PLOP_VECTOR_CLONES void sumsq_rows_float16(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  sumsq_rows<Float16>(args, begin, end);
}
PLOP_VECTOR_CLONES void sumsq_rows_bfloat16(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  sumsq_rows<BFloat16>(args, begin, end);
}

}  // namespace

void row_sumsq_cpu(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return sumsq_rows_float32(args, begin, end);
    case DType::kFloat64:
      return sumsq_rows_float64(args, begin, end);
    case DType::kFloat16:
      return sumsq_rows_float16(args, begin, end);
    case DType::kBFloat16:
      return sumsq_rows_bfloat16(args, begin, end);
  }
}

}  // namespace plop_ext
