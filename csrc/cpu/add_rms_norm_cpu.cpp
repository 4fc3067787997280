// Add + RMSNorm on the CPU: two passes over a row, three with an inner norm, each in blocks.
#include <algorithm>

#include "../add_rms_norm.h"
#include "rms_norm.h"

namespace plop_ext {
namespace {

template <typename Element>
PLOP_INLINE void norm_row(const AddRmsNormArgs& args, int64_t row) {
  using Storage = typename Element::Storage;
  const int64_t n = args.in_features;
  const auto* inner_weight = static_cast<const Storage*>(args.inner_weight);
  const auto* weight = static_cast<const Storage*>(args.weight);
  const auto* bias = static_cast<const Storage*>(args.bias);
  const auto* x = static_cast<const Storage*>(args.x) + row * n;
  const auto* residual = args.residual ? static_cast<const Storage*>(args.residual) + row * n : nullptr;
  auto* normed = static_cast<Storage*>(args.normed) + row * n;
  auto* hidden = args.hidden ? static_cast<Storage*>(args.hidden) + row * n : nullptr;
  const int64_t slot = sum_slot(row, args.step, args.phase);
  const bool wants_x = args.x_sumsq && slot >= 0;
  const bool wants_normed = args.normed_sumsq && slot >= 0;
  LaneSum<Element> x_sum, inner_sum, hidden_sum, normed_sum;

  float inner_rstd = 0.0f;
  if (inner_weight) {
    inner_sum.add(x, nullptr, n);
    inner_rstd = reciprocal_rms(inner_sum.total(), n, args.inner_eps);
  }
  // A hidden row that is not stored passes through `normed`.
  Storage* sum = hidden ? hidden : normed;
  const bool unchanged = !inner_weight && !residual;
  for (int64_t k = 0; k < n; k += kBlock) {
    const int64_t size = std::min(kBlock, n - k);
    if (wants_x) x_sum.add(x + k, bias ? bias + k : nullptr, size);
    const Storage* y = x + k;
    if (inner_weight) {
      scale<Element>(y, inner_rstd, inner_weight + k, args.unit_offset, sum + k, size);
      y = sum + k;
    }
    if (residual) {
      for (int64_t i = 0; i < size; ++i) {
        sum[k + i] = Element::store(Element::load(residual[k + i]) + Element::load(y[i]));
      }
      y = sum + k;
    }
    if (hidden && unchanged) {
      for (int64_t i = 0; i < size; ++i) hidden[k + i] = y[i];
    }
    hidden_sum.add(y, nullptr, size);
  }
  if (wants_x) args.x_sumsq[slot] = x_sum.total();

  const Storage* source = unchanged ? x : sum;
  const float rstd = reciprocal_rms(hidden_sum.total(), n, args.eps);
  for (int64_t k = 0; k < n; k += kBlock) {
    const int64_t size = std::min(kBlock, n - k);
    scale<Element>(source + k, rstd, weight + k, args.unit_offset, normed + k, size);
    if (wants_normed) normed_sum.add(normed + k, nullptr, size);
  }
  if (wants_normed) args.normed_sumsq[slot] = normed_sum.total();
}

template <typename Element>
PLOP_INLINE void norm_rows(const AddRmsNormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) norm_row<Element>(args, row);
}

PLOP_VECTOR_CLONES void norm_rows_float32(const AddRmsNormArgs& args, int64_t begin, int64_t end) {
  norm_rows<Float32>(args, begin, end);
}
PLOP_VECTOR_CLONES void norm_rows_float16(const AddRmsNormArgs& args, int64_t begin, int64_t end) {
  norm_rows<Float16>(args, begin, end);
}
PLOP_VECTOR_CLONES void norm_rows_bfloat16(const AddRmsNormArgs& args, int64_t begin, int64_t end) {
  norm_rows<BFloat16>(args, begin, end);
}

}  // namespace

void add_rms_norm_cpu(const AddRmsNormArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return norm_rows_float32(args, begin, end);
    case DType::kFloat16:
      return norm_rows_float16(args, begin, end);
    case DType::kBFloat16:
      return norm_rows_bfloat16(args, begin, end);
    case DType::kFloat64:
      return;
  }
}

}  // namespace plop_ext
