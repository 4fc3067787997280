// plop_ext::add_rms_norm_: checks, then the CPU or the CUDA kernel. The schema and its documentation:
// plop_ext/ops/add_rms_norm.py.
#include "add_rms_norm.h"

#include <optional>

#include "checks.h"
#include "run.h"

namespace plop_ext {
namespace {

constexpr const char* kOp = "add_rms_norm_";

void add_rms_norm(const Tensor& normed,                       // [R, K]
                  const std::optional<Tensor>& hidden,        // [R, K]
                  const Tensor& x,                            // [R, K]
                  const std::optional<Tensor>& residual,      // [R, K]
                  const Tensor& weight,                       // [K]
                  double eps,                                 //
                  const std::optional<Tensor>& inner_weight,  // [K]
                  double inner_eps, bool unit_offset,         //
                  const std::optional<Tensor>& bias,          // [K]
                  const std::optional<Tensor>& x_sumsq,       // one element per row read
                  const std::optional<Tensor>& normed_sumsq,  // as x_sumsq
                  int64_t step, int64_t phase) {
  Arguments matrices = {{"normed", &normed, 2}};
  add_given(matrices, "hidden", hidden, 2);
  add_given(matrices, "residual", residual, 2);
  Arguments vectors = {{"weight", &weight, 1}};
  add_given(vectors, "inner_weight", inner_weight, 1);
  add_given(vectors, "bias", bias, 1);
  Arguments sums;
  add_given(sums, "x_sumsq", x_sumsq, 1);
  add_given(sums, "normed_sumsq", normed_sumsq, 1);
  const Arguments tensors = joined(matrices, vectors);
  AddRmsNormArgs args = {};
  args.dtype = check_fused(kOp, {"x", &x, 2}, tensors, sums);

  args.n_rows = x.size(0);
  args.in_features = x.size(1);
  STD_TORCH_CHECK(args.in_features > 0 && args.in_features <= kMaxNormFeatures && args.in_features % kVector == 0, kOp,
                  ": x must have a multiple of ", kVector, " up to ", kMaxNormFeatures, " as last size, got ",
                  args.in_features);
  for (const Argument& a : matrices) check_shape(kOp, *a.tensor, a.name, {args.n_rows, args.in_features});
  for (const Argument& a : vectors) check_elements(kOp, *a.tensor, a.name, args.in_features);
  check_contiguous(kOp, x, "x");
  for (const Argument& a : tensors) check_contiguous(kOp, *a.tensor, a.name);
  for (const Argument& a : sums) check_contiguous(kOp, *a.tensor, a.name);
  check_aligned(kOp, x, "x");
  for (const Argument& a : tensors) check_aligned(kOp, *a.tensor, a.name);
  check_rows(kOp, sums, args.n_rows, step, phase);

  args.x = x.const_data_ptr();
  args.residual = data_or_null(residual);
  args.inner_weight = data_or_null(inner_weight);
  args.weight = weight.const_data_ptr();
  args.bias = data_or_null(bias);
  args.hidden = mutable_data_or_null(hidden);
  args.normed = normed.mutable_data_ptr();
  args.x_sumsq = static_cast<float*>(mutable_data_or_null(x_sumsq));
  args.normed_sumsq = static_cast<float*>(mutable_data_or_null(normed_sumsq));
  args.inner_eps = static_cast<float>(inner_eps);
  args.eps = static_cast<float>(eps);
  args.unit_offset = unit_offset;
  args.step = step;
  args.phase = phase;
  run_rows<add_rms_norm_cpu, launch_add_rms_norm>(kOp, x, args, args.n_rows, args.in_features, kFusedGrain);
}

}  // namespace
}  // namespace plop_ext

PLOP_REGISTER("add_rms_norm_", plop_ext::add_rms_norm)
