// plop_ext::row_sumsq_: checks, then the CPU or the CUDA kernel. The schema and its documentation:
// plop_ext/ops/row_sumsq.py.
#include "row_sumsq.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "checks.h"
#ifdef PLOP_WITH_CUDA
#include "stream.h"
#endif

namespace plop_ext {
namespace {

constexpr const char* kOp = "row_sumsq_";

RowSumsqArgs checked_args(const Tensor& out,                  // [R]
                          const Tensor& x,                    // [T, K] or [N, T, K]
                          const std::optional<Tensor>& bias,  // [K] or [T, K]
                          int64_t step, int64_t phase) {
  check_same_device(kOp, out, "out", x);
  if (bias) check_same_device(kOp, *bias, "bias", x);

  RowSumsqArgs args = {};
  args.dtype = element_type(kOp, x, "x");
  check_dtype(kOp, out, "out", args.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float);
  if (bias) {
    const bool half = args.dtype == DType::kFloat16 || args.dtype == DType::kBFloat16;
    const bool same = bias->scalar_type() == x.scalar_type();
    STD_TORCH_CHECK(same || (half && bias->scalar_type() == ScalarType::Float), kOp, ": bias must be ",
                    torch::headeronly::toString(x.scalar_type()), half ? " or Float" : "", ", got ",
                    torch::headeronly::toString(bias->scalar_type()));
    args.bias_dtype = same ? args.dtype : DType::kFloat32;
  }

  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, kOp, ": x must have 2 or 3 dimensions, got ", x.dim());
  check_dim(kOp, out, "out", 1);
  check_contiguous(kOp, out, "out");

  const bool batched = x.dim() == 3;
  const int64_t outer = batched ? x.size(0) : 1;
  args.inner = x.size(batched ? 1 : 0);
  args.in_features = x.size(batched ? 2 : 1);
  args.outer_stride = batched ? x.stride(0) : 0;
  args.row_stride = x.stride(batched ? 1 : 0);
  args.feature_stride = x.stride(batched ? 2 : 1);
  if (bias) {
    const bool per_row = batched && bias->dim() == 2;
    if (!per_row) check_dim(kOp, *bias, "bias", 1);
    check_contiguous(kOp, *bias, "bias");
    const int64_t wanted = per_row ? args.inner * args.in_features : args.in_features;
    STD_TORCH_CHECK(bias->numel() == wanted && bias->size(bias->dim() - 1) == args.in_features, kOp,
                    ": bias must have ", wanted, " elements, got ", bias->numel());
    args.bias_stride = per_row ? args.in_features : 0;
  }

  STD_TORCH_CHECK(step >= 1, kOp, ": step must be at least 1, got ", step);
  STD_TORCH_CHECK(phase >= 0 && phase < step, kOp, ": phase must be in [0, step), got ", phase);
  const int64_t rows = outer * args.inner;
  args.n_rows = rows > phase ? (rows - phase - 1) / step + 1 : 0;
  STD_TORCH_CHECK(out.size(0) == args.n_rows, kOp, ": out must have ", args.n_rows, " elements, got ", out.size(0));

  // One row axis where the two can be merged; strides of axes of one element carry no information.
  if (args.in_features <= 1) args.feature_stride = 1;
  const bool mergeable = outer <= 1 || args.inner == 1 || args.outer_stride == args.inner * args.row_stride;
  if (mergeable && args.bias_stride == 0) {
    if (args.inner == 1) args.row_stride = args.outer_stride;
    args.inner = rows;
    args.outer_stride = 0;
  }
  if (rows == 1) args.row_stride = 0;
  args.x = x.const_data_ptr();
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  args.step = step;
  args.phase = phase;
  return args;
}

// The CPU kernel reads the bias in the type it sums in.
template <typename Sum>
std::vector<Sum> widened(const Tensor& bias) {
  std::vector<Sum> values(static_cast<size_t>(bias.numel()));
  const auto bits_to_float = [](uint32_t bits) {
    float value;
    static_assert(sizeof(value) == sizeof(bits));
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
  };
  for (size_t k = 0; k < values.size(); ++k) {
    switch (bias.scalar_type()) {
      case ScalarType::Float:
        values[k] = static_cast<Sum>(static_cast<const float*>(bias.const_data_ptr())[k]);
        break;
      case ScalarType::Double:
        values[k] = static_cast<Sum>(static_cast<const double*>(bias.const_data_ptr())[k]);
        break;
      case ScalarType::BFloat16:
        values[k] = bits_to_float(static_cast<uint32_t>(static_cast<const uint16_t*>(bias.const_data_ptr())[k]) << 16);
        break;
      default:
        values[k] = static_cast<float>(static_cast<const torch::headeronly::Half*>(bias.const_data_ptr())[k]);
    }
  }
  return values;
}

void row_sumsq_on_cpu(Tensor out, Tensor x, std::optional<Tensor> bias, int64_t step, int64_t phase) {
  RowSumsqArgs args = checked_args(out, x, bias, step, phase);
  if (args.n_rows == 0) return;
  std::vector<float> bias_float;
  std::vector<double> bias_double;
  if (bias && args.dtype == DType::kFloat64) {
    bias_double = widened<double>(*bias);
    args.bias = bias_double.data();
  } else if (bias && args.bias_dtype != DType::kFloat32) {
    bias_float = widened<float>(*bias);
    args.bias = bias_float.data();
  }
  // Below this many elements a second thread costs more than it saves.
  constexpr int64_t kGrain = 32768;
  const int64_t grain = 1 + kGrain / (args.in_features + 1);
  torch::stable::parallel_for(0, args.n_rows, grain,
                              [&args](int64_t begin, int64_t end) { row_sumsq_cpu(args, begin, end); });
}

#ifdef PLOP_WITH_CUDA
void row_sumsq_on_cuda(Tensor out, Tensor x, std::optional<Tensor> bias, int64_t step, int64_t phase) {
  const RowSumsqArgs args = checked_args(out, x, bias, step, phase);
  if (args.n_rows == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const char* error = launch_row_sumsq(args, current_cuda_stream(x.get_device_index()));
  STD_TORCH_CHECK(error == nullptr, kOp, ": the CUDA kernel failed to launch: ", error);
}
#endif

}  // namespace
}  // namespace plop_ext

STABLE_TORCH_LIBRARY_IMPL(plop_ext, CPU, m) { m.impl("row_sumsq_", TORCH_BOX(&plop_ext::row_sumsq_on_cpu)); }
#ifdef PLOP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(plop_ext, CUDA, m) { m.impl("row_sumsq_", TORCH_BOX(&plop_ext::row_sumsq_on_cuda)); }
#endif
