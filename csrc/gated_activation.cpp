// plop_ext::gated_activation_: checks, then the CPU or the CUDA kernel. The schema and its documentation:
// plop_ext/ops/gated_activation.py.
#include "gated_activation.h"

#include <optional>
#include <string>

#include "checks.h"
#include "run.h"

namespace plop_ext {
namespace {

constexpr const char* kOp = "gated_activation_";

// Returns the row stride of `t`, in elements.
int64_t checked_stride(const Tensor& t, const char* name) {
  const int64_t rows = t.size(0);
  const bool fits = rows == 0 || (t.stride(1) == 1 && (rows == 1 || t.stride(0) % kVector == 0));
  STD_TORCH_CHECK(fits, kOp, ": ", name, " must have strides (s, 1), s a multiple of ", kVector, ", got (",
                  listed(t.strides()), ")");
  return rows > 1 ? t.stride(0) : 0;
}

void gated_activation(const Tensor& out,                        // [R, I]
                      const Tensor& gate,                       // [R, I]
                      const Tensor& up,                         // [R, I]
                      const std::string& activation,            //
                      const std::optional<Tensor>& gate_bias,   // [I]
                      const std::optional<Tensor>& up_bias,     // [I]
                      const std::optional<Tensor>& gate_sumsq,  // one element per row read
                      const std::optional<Tensor>& up_sumsq,    // as gate_sumsq
                      const std::optional<Tensor>& out_sumsq,   // as gate_sumsq
                      int64_t step, int64_t phase) {
  Arguments vectors;
  add_given(vectors, "gate_bias", gate_bias, 1);
  add_given(vectors, "up_bias", up_bias, 1);
  Arguments sums;
  add_given(sums, "gate_sumsq", gate_sumsq, 1);
  add_given(sums, "up_sumsq", up_sumsq, 1);
  add_given(sums, "out_sumsq", out_sumsq, 1);
  const Arguments tensors = joined({{"out", &out, 2}, {"up", &up, 2}}, vectors);
  GatedActivationArgs args = {};
  args.dtype = check_fused(kOp, {"gate", &gate, 2}, tensors, sums);

  args.n_rows = gate.size(0);
  args.features = gate.size(1);
  STD_TORCH_CHECK(args.features > 0 && args.features % kVector == 0, kOp, ": gate must have a multiple of ", kVector,
                  " as last size, got ", args.features);
  check_shape(kOp, out, "out", {args.n_rows, args.features});
  check_shape(kOp, up, "up", {args.n_rows, args.features});
  for (const Argument& a : vectors) check_elements(kOp, *a.tensor, a.name, args.features);
  args.gate_stride = checked_stride(gate, "gate");
  args.up_stride = checked_stride(up, "up");
  check_contiguous(kOp, out, "out");
  for (const Argument& a : vectors) check_contiguous(kOp, *a.tensor, a.name);
  for (const Argument& a : sums) check_contiguous(kOp, *a.tensor, a.name);
  check_aligned(kOp, gate, "gate");
  for (const Argument& a : tensors) check_aligned(kOp, *a.tensor, a.name);
  STD_TORCH_CHECK(activation == "silu" || activation == "gelu_tanh", kOp,
                  ": activation must be silu or gelu_tanh, got ", activation);
  check_rows(kOp, sums, args.n_rows, step, phase);

  args.gate = gate.const_data_ptr();
  args.up = up.const_data_ptr();
  args.gate_bias = data_or_null(gate_bias);
  args.up_bias = data_or_null(up_bias);
  args.out = out.mutable_data_ptr();
  args.gate_sumsq = static_cast<float*>(mutable_data_or_null(gate_sumsq));
  args.up_sumsq = static_cast<float*>(mutable_data_or_null(up_sumsq));
  args.out_sumsq = static_cast<float*>(mutable_data_or_null(out_sumsq));
  args.activation = activation == "silu" ? Activation::kSilu : Activation::kGeluTanh;
  args.step = step;
  args.phase = phase;
  run_rows<gated_activation_cpu, launch_gated_activation>(kOp, gate, args, args.n_rows, args.features, kFusedGrain);
}

}  // namespace
}  // namespace plop_ext

PLOP_REGISTER("gated_activation_", plop_ext::gated_activation)
