// plop_ext::rotary_: checks, then the CPU or the CUDA kernel. The schema and its documentation: plop_ext/ops/rotary.py.
#include "rotary.h"

#include <optional>

#include "checks.h"
#include "run.h"

namespace plop_ext {
namespace {

constexpr const char* kOp = "rotary_";

// Returns the token stride of `t` [B, T, H, D], which must be a view of [B, T, s].
int64_t checked_stride(const Tensor& t, const char* name) {
  const int64_t batch = t.size(0);
  const int64_t length = t.size(1);
  if (batch == 0 || length == 0) return 0;
  const int64_t token = length > 1 ? t.stride(1) : batch > 1 ? t.stride(0) : 0;
  const bool heads = t.stride(3) == 1 && (t.size(2) == 1 || t.stride(2) == t.size(3));
  const bool samples = batch == 1 || t.stride(0) == length * token;
  STD_TORCH_CHECK(heads && samples && token % kVector == 0, kOp, ": ", name,
                  " must have strides (T * s, s, D, 1), s a multiple of ", kVector, ", got (", listed(t.strides()),
                  ")");
  return token;
}

RotaryHeads heads_args(const Tensor& out, const Tensor& x, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& sumsq, int64_t stride) {
  RotaryHeads heads = {};
  heads.x = x.const_data_ptr();
  heads.weight = data_or_null(weight);
  heads.bias = data_or_null(bias);
  heads.out = out.mutable_data_ptr();
  heads.sumsq = static_cast<float*>(mutable_data_or_null(sumsq));
  heads.heads = x.size(2);
  heads.stride = stride;
  return heads;
}

void rotary(const Tensor& q_out,                    // [B, T, H, D]
            const Tensor& k_out,                    // [B, T, Hk, D]
            const Tensor& q,                        // [B, T, H, D]
            const Tensor& k,                        // [B, T, Hk, D]
            const Tensor& cos,                      // [B or 1, T, R]
            const Tensor& sin,                      // as cos
            const std::optional<Tensor>& q_weight,  // [D]
            const std::optional<Tensor>& k_weight,  // [D]
            double eps, bool unit_offset,           //
            const std::optional<Tensor>& q_bias,    // [H * D]
            const std::optional<Tensor>& k_bias,    // [Hk * D]
            const std::optional<Tensor>& q_sumsq,   // one element per token read
            const std::optional<Tensor>& k_sumsq,   // as q_sumsq
            int64_t step, int64_t phase) {
  Arguments weights;
  add_given(weights, "q_weight", q_weight, 1);
  add_given(weights, "k_weight", k_weight, 1);
  Arguments biases;
  add_given(biases, "q_bias", q_bias, 1);
  add_given(biases, "k_bias", k_bias, 1);
  Arguments sums;
  add_given(sums, "q_sumsq", q_sumsq, 1);
  add_given(sums, "k_sumsq", k_sumsq, 1);
  const Arguments outs = {{"q_out", &q_out, 4}, {"k_out", &k_out, 4}};
  const Arguments constants = joined(joined({{"cos", &cos, 3}, {"sin", &sin, 3}}, weights), biases);
  const Arguments tensors = joined(joined(outs, {{"k", &k, 4}}), constants);
  RotaryArgs args = {};
  args.dtype = check_fused(kOp, {"q", &q, 4}, tensors, sums);

  const int64_t batch = q.size(0);
  const int64_t length = q.size(1);
  const int64_t head_dim = q.size(3);
  const int64_t rotary_dim = cos.size(2);
  STD_TORCH_CHECK(head_dim > 0 && head_dim <= kMaxHeadDim && head_dim % kRotaryUnit == 0, kOp,
                  ": q must have a multiple of ", kRotaryUnit, " up to ", kMaxHeadDim, " as last size, got ", head_dim);
  STD_TORCH_CHECK(rotary_dim > 0 && rotary_dim <= head_dim && rotary_dim % kRotaryUnit == 0, kOp,
                  ": cos must have a multiple of ", kRotaryUnit, " up to ", head_dim, " as last size, got ",
                  rotary_dim);
  STD_TORCH_CHECK(weights.size() != 1, kOp, ": q_weight and k_weight must come together, got one");
  const int64_t units = head_dim / kRotaryUnit;
  STD_TORCH_CHECK(weights.empty() || (units & (units - 1)) == 0, kOp, ": q must have ", kRotaryUnit,
                  " times a power of two as last size with a weight, got ", head_dim);
  STD_TORCH_CHECK(q.size(2) > 0, kOp, ": q must have at least 1 head, got 0");
  STD_TORCH_CHECK(k.size(2) > 0, kOp, ": k must have at least 1 head, got 0");
  check_shape(kOp, q_out, "q_out", {batch, length, q.size(2), head_dim});
  check_shape(kOp, k_out, "k_out", {k.size(0), k.size(1), k.size(2), k.size(3)});
  check_shape(kOp, k, "k", {batch, length, k.size(2), head_dim});
  check_shape(kOp, cos, "cos", {cos.size(0) == 1 ? 1 : batch, length, rotary_dim});
  check_shape(kOp, sin, "sin", {cos.size(0), length, rotary_dim});
  for (const Argument& a : weights) check_elements(kOp, *a.tensor, a.name, head_dim);
  if (q_bias) check_elements(kOp, *q_bias, "q_bias", q.size(2) * head_dim);
  if (k_bias) check_elements(kOp, *k_bias, "k_bias", k.size(2) * head_dim);
  const int64_t q_stride = checked_stride(q, "q");
  const int64_t k_stride = checked_stride(k, "k");
  for (const Argument& a : outs) check_contiguous(kOp, *a.tensor, a.name);
  for (const Argument& a : constants) check_contiguous(kOp, *a.tensor, a.name);
  for (const Argument& a : sums) check_contiguous(kOp, *a.tensor, a.name);
  check_aligned(kOp, q, "q");
  for (const Argument& a : tensors) check_aligned(kOp, *a.tensor, a.name);
  args.n_rows = batch * length;
  check_rows(kOp, sums, args.n_rows, step, phase);

  args.q = heads_args(q_out, q, q_weight, q_bias, q_sumsq, q_stride);
  args.k = heads_args(k_out, k, k_weight, k_bias, k_sumsq, k_stride);
  args.cos = cos.const_data_ptr();
  args.sin = sin.const_data_ptr();
  args.cos_rows = cos.size(0) * length;
  args.head_dim = head_dim;
  args.rotary_dim = rotary_dim;
  args.eps = static_cast<float>(eps);
  args.unit_offset = unit_offset;
  args.step = step;
  args.phase = phase;
  const int64_t features = (args.q.heads + args.k.heads) * args.head_dim;
  run_rows<rotary_cpu, launch_rotary>(kOp, q, args, args.n_rows, features, kFusedGrain);
}

}  // namespace
}  // namespace plop_ext

PLOP_REGISTER("rotary_", plop_ext::rotary)
