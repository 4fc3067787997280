// Sum of squares per row on the CPU.
#include "../row_sumsq.h"
#include "vector.h"

namespace plop_ext {
namespace {

template <typename Element, typename Bias>
PLOP_INLINE void sumsq_rows(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  using Sum = typename Element::Sum;
  const auto* x = static_cast<const typename Element::Storage*>(args.x);
  const auto* bias = static_cast<const Sum*>(args.bias);
  auto* out = static_cast<Sum*>(args.out);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t row = args.phase + r * args.step;
    const auto* p = x + (row / args.inner) * args.outer_stride + (row % args.inner) * args.row_stride;
    const auto* shift = bias ? bias + (row % args.inner) * args.bias_stride : nullptr;
    out[r] = sumsq<Element, Bias>(p, shift, args.in_features, args.feature_stride);
  }
}

PLOP_VECTOR_CLONES void sumsq_rows_float32(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  sumsq_rows<Float32, Float32>(args, begin, end);
}
PLOP_VECTOR_CLONES void sumsq_rows_float64(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  sumsq_rows<Float64, Float64>(args, begin, end);
}
PLOP_VECTOR_CLONES void sumsq_rows_float16(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  sumsq_rows<Float16, Float32>(args, begin, end);
}
PLOP_VECTOR_CLONES void sumsq_rows_bfloat16(const RowSumsqArgs& args, int64_t begin, int64_t end) {
  sumsq_rows<BFloat16, Float32>(args, begin, end);
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
