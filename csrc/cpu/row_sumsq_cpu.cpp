// Sum of squares per row on the CPU.
#include <vector>

#include "../row_sumsq.h"
#include "vector.h"

namespace plop_ext {
namespace {

template <typename Element, typename Bias>
PLOP_INLINE void sumsq_rows(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  using Sum = typename Element::Sum;
  const auto* x = static_cast<const typename Element::Storage*>(args.x);
  const auto* bias = static_cast<const typename Bias::Storage*>(args.bias);
  auto* out = static_cast<Sum*>(args.out);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t row = args.phase + r * args.step;
    const auto* p = x + (row / args.inner) * args.outer_stride + (row % args.inner) * args.row_stride;
    const auto* shift = bias ? bias + (row % args.inner) * args.bias_stride : nullptr;
    out[r] = sumsq<Element, Bias>(p, shift, args.in_features, args.feature_stride);
  }
}

// A 16-bit bias that all rows share is widened once per range of rows: widening it again for each row takes 40 % longer
// in bfloat16 and 70 % in float16. Where each inner row has its own, few rows use the same one.
template <typename Element>
PLOP_INLINE void sumsq_rows_of_16_bits(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  if (!args.bias || args.bias_dtype == DType::kFloat32) return sumsq_rows<Element, Float32>(args, begin, end);
  if (args.bias_stride != 0) return sumsq_rows<Element, Element>(args, begin, end);
  const auto* bias = static_cast<const typename Element::Storage*>(args.bias);
  std::vector<float> widened(static_cast<size_t>(args.in_features));
  float* values = widened.data();
  for (int64_t k = 0; k < args.in_features; ++k) values[k] = Element::load(bias[k]);
  RowSumsqArgs with_widened = args;
  with_widened.bias = values;
  sumsq_rows<Element, Float32>(with_widened, begin, end);
}

PLOP_VECTOR_CLONES void sumsq_rows_float32(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  sumsq_rows<Float32, Float32>(args, begin, end);
}
PLOP_VECTOR_CLONES void sumsq_rows_float64(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  sumsq_rows<Float64, Float64>(args, begin, end);
}
PLOP_VECTOR_CLONES void sumsq_rows_float16(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  sumsq_rows_of_16_bits<Float16>(args, begin, end);
}
PLOP_VECTOR_CLONES void sumsq_rows_bfloat16(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  sumsq_rows_of_16_bits<BFloat16>(args, begin, end);
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

void row_sumsq_pair_cpu(const RowSumsqPair& pair, int64_t begin, int64_t end) {
  for (const RowSumsqArgs& args : pair.parts) row_sumsq_cpu(args, begin, end);
}

}  // namespace plop_ext
