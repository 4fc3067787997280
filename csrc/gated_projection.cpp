// plop_ext::gated_projection_ and has_gated_projection: checks, then the CUDA kernel. The CPU has none; PyTorch's
// kernel serves there. The schemas and their documentation: plop_ext/ops/gated_projection.py.
#include "gated_projection.h"

#include <limits>
#include <optional>
#include <string>

#include "checks.h"
#include "run.h"

#ifdef PLOP_WITH_CUDA
namespace plop_ext {
namespace {

constexpr const char* kOp = "gated_projection_";
constexpr int64_t kMaxSize =
    std::numeric_limits<int32_t>::max() - 1024;  // coordinates one tile past the end still fit 32 bits

void check_width(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.size(1) > 0 && t.size(1) % kVector == 0, kOp, ": ", name, " must have a multiple of ", kVector,
                  " as last size, got ", t.size(1));
}

void gated_projection(const Tensor& out,                        // [R, I]
                      const Tensor& x,                          // [R, K]
                      const Tensor& gate_weight,                // [I, K]
                      const Tensor& up_weight,                  // [I, K]
                      const std::string& activation,            //
                      const std::optional<Tensor>& gate_sumsq,  // one element per row read
                      const std::optional<Tensor>& up_sumsq,    // as gate_sumsq
                      const std::optional<Tensor>& out_sumsq,   // as gate_sumsq
                      int64_t step, int64_t phase) {
  Arguments sums;
  add_given(sums, "gate_sumsq", gate_sumsq, 1);
  add_given(sums, "up_sumsq", up_sumsq, 1);
  add_given(sums, "out_sumsq", out_sumsq, 1);
  const Arguments tensors = {{"out", &out, 2}, {"gate_weight", &gate_weight, 2}, {"up_weight", &up_weight, 2}};
  GatedProjectionArgs args = {};
  args.dtype = check_fused(kOp, {"x", &x, 2}, tensors, sums);
  STD_TORCH_CHECK(args.dtype != DType::kFloat32, kOp, ": x must be float16 or bfloat16, got Float");

  args.n_rows = x.size(0);
  args.in_features = x.size(1);
  args.features = out.size(1);
  check_width(x, "x");
  check_width(out, "out");
  check_shape(kOp, gate_weight, "gate_weight", {args.features, args.in_features});
  check_shape(kOp, up_weight, "up_weight", {args.features, args.in_features});
  check_shape(kOp, out, "out", {args.n_rows, args.features});
  check_contiguous(kOp, x, "x");
  for (const Argument& a : tensors) check_contiguous(kOp, *a.tensor, a.name);
  for (const Argument& a : sums) check_contiguous(kOp, *a.tensor, a.name);
  check_aligned(kOp, x, "x");
  for (const Argument& a : tensors) check_aligned(kOp, *a.tensor, a.name);
  STD_TORCH_CHECK(activation == "silu" || activation == "gelu_tanh", kOp,
                  ": activation must be silu or gelu_tanh, got ", activation);
  check_rows(kOp, sums, args.n_rows, step, phase);
  for (const int64_t size : {args.n_rows, args.in_features, args.features}) {
    STD_TORCH_CHECK(size <= kMaxSize, kOp, ": sizes must be at most ", kMaxSize, ", got ", size);
  }

  args.x = x.const_data_ptr();
  args.gate_weight = gate_weight.const_data_ptr();
  args.up_weight = up_weight.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.gate_sumsq = static_cast<float*>(mutable_data_or_null(gate_sumsq));
  args.up_sumsq = static_cast<float*>(mutable_data_or_null(up_sumsq));
  args.out_sumsq = static_cast<float*>(mutable_data_or_null(out_sumsq));
  args.activation = activation == "silu" ? Activation::kSilu : Activation::kGeluTanh;
  args.step = step;
  args.phase = phase;
  if (args.n_rows == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(has_gated_projection(), kOp, ": x must be on a device of compute capability 9.0 that the library ",
                  "was built for, got ", device_name(x));
  Tensor workspace = x;
  if (gate_sumsq || up_sumsq || out_sumsq) {
    const int64_t tiles = (args.features + kProjectionTile - 1) / kProjectionTile;
    workspace = torch::stable::new_empty(x, {tiles, kProjectionSums, args.n_rows}, ScalarType::Float);
    args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  }
  enqueue<launch_gated_projection>(kOp, x, args);
}

bool device_has_gated_projection(const Tensor& device) {
  const torch::stable::accelerator::DeviceGuard guard(device.get_device_index());
  return has_gated_projection();
}

}  // namespace
}  // namespace plop_ext

PLOP_REGISTER_CUDA("gated_projection_", plop_ext::gated_projection)
PLOP_REGISTER_CUDA("has_gated_projection", plop_ext::device_has_gated_projection)
#endif
