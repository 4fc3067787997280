// plop_ext::row_sumsq_ and row_sumsq_pair_: checks, then the CPU or the CUDA kernel. The schemas and their
// documentation: plop_ext/ops/row_sumsq.py and row_sumsq_pair.py.
#include "row_sumsq.h"

#include <optional>

#include "checks.h"
#include "run.h"

namespace plop_ext {
namespace {

constexpr const char* kOp = "row_sumsq_";
constexpr const char* kPairOp = "row_sumsq_pair_";

void check_bias_dtype(const char* op, const Tensor& bias, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  const bool half = type == ScalarType::Half || type == ScalarType::BFloat16;
  STD_TORCH_CHECK(bias.scalar_type() == type || (half && bias.scalar_type() == ScalarType::Float), op,
                  ": bias must be ", torch::headeronly::toString(type), half ? " or Float" : "", ", got ",
                  torch::headeronly::toString(bias.scalar_type()));
}

void check_sums(const char* op, const Tensor& out) {
  check_dim(op, out, "out", 1);
  check_contiguous(op, out, "out");
}

void check_rank(const char* op, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, op, ": ", name, " must have 2 or 3 dimensions, got ", x.dim());
}

bool one_bias_per_inner_row(const Tensor& bias, const Tensor& x) { return x.dim() == 3 && bias.dim() == 2; }

void check_bias_shape(const char* op, const Tensor& bias, const Tensor& x) {
  const bool per_row = one_bias_per_inner_row(bias, x);
  const int64_t in_features = x.size(x.dim() - 1);
  if (!per_row) check_dim(op, bias, "bias", 1);
  check_contiguous(op, bias, "bias");
  const int64_t wanted = per_row ? x.size(1) * in_features : in_features;
  STD_TORCH_CHECK(bias.numel() == wanted && bias.size(bias.dim() - 1) == in_features, op, ": bias must have ", wanted,
                  " elements, got ", bias.numel());
}

int64_t rows_of(const Tensor& x) { return x.dim() == 3 ? x.size(0) * x.size(1) : x.size(0); }

// The kernels' arguments, all but `out`, from arguments of the op that passed the checks.
RowSumsqArgs rows_to_read(DType dtype,
                          const Tensor& x,                    // [T, K] or [N, T, K]
                          const std::optional<Tensor>& bias,  // [K] or [T, K]
                          int64_t n_rows, int64_t step, int64_t phase) {
  RowSumsqArgs args = {};
  args.dtype = dtype;
  args.n_rows = n_rows;
  const bool batched = x.dim() == 3;
  const int64_t outer = batched ? x.size(0) : 1;
  args.inner = x.size(batched ? 1 : 0);
  args.in_features = x.size(batched ? 2 : 1);
  args.outer_stride = batched ? x.stride(0) : 0;
  args.row_stride = x.stride(batched ? 1 : 0);
  args.feature_stride = x.stride(batched ? 2 : 1);
  if (bias) {
    args.bias_dtype = bias->scalar_type() == x.scalar_type() ? dtype : DType::kFloat32;
    args.bias_stride = one_bias_per_inner_row(*bias, x) ? args.in_features : 0;
  }

  // Merge the two row axes where their strides allow it; the stride of an axis of one element carries no information.
  const int64_t rows = outer * args.inner;
  if (args.in_features <= 1) args.feature_stride = 1;
  const bool mergeable = outer <= 1 || args.inner == 1 || args.outer_stride == args.inner * args.row_stride;
  if (mergeable && args.bias_stride == 0) {
    if (args.inner == 1) args.row_stride = args.outer_stride;
    args.inner = rows;
    args.outer_stride = 0;
  }
  if (rows == 1) args.row_stride = 0;
  args.x = x.const_data_ptr();
  args.bias = data_or_null(bias);
  args.step = step;
  args.phase = phase;
  return args;
}

void row_sumsq(const Tensor& out,                  // [R]
               const Tensor& x,                    // [T, K] or [N, T, K]
               const std::optional<Tensor>& bias,  // [K] or [T, K]
               int64_t step, int64_t phase) {
  check_same_device(kOp, out, "out", x);
  if (bias) check_same_device(kOp, *bias, "bias", x);
  const DType dtype = element_type(kOp, x, "x");
  check_dtype(kOp, out, "out", dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float);
  if (bias) check_bias_dtype(kOp, *bias, x);
  check_rank(kOp, x, "x");
  check_sums(kOp, out);
  if (bias) check_bias_shape(kOp, *bias, x);
  const int64_t n_rows = checked_rows_read(kOp, rows_of(x), step, phase);
  check_elements(kOp, out, "out", n_rows);

  RowSumsqArgs args = rows_to_read(dtype, x, bias, n_rows, step, phase);
  args.out = out.mutable_data_ptr();
  run_rows<row_sumsq_cpu, launch_row_sumsq>(kOp, x, args, n_rows, args.in_features, kReadGrain);
}

void row_sumsq_pair(const Tensor& out,                  // [2 * R]
                    const Tensor& x,                    // [T, K] or [N, T, K]
                    const Tensor& y,                    // as many rows, [.., M]
                    const std::optional<Tensor>& bias,  // [M] or [T, M]
                    int64_t step, int64_t phase) {
  check_same_device(kPairOp, out, "out", x);
  check_same_device(kPairOp, y, "y", x);
  if (bias) check_same_device(kPairOp, *bias, "bias", x);
  const DType dtype = element_type(kPairOp, x, "x");
  const bool is_double = dtype == DType::kFloat64;
  check_dtype(kPairOp, y, "y", x.scalar_type());
  check_dtype(kPairOp, out, "out", is_double ? ScalarType::Double : ScalarType::Float);
  if (bias) check_bias_dtype(kPairOp, *bias, y);
  check_rank(kPairOp, x, "x");
  check_rank(kPairOp, y, "y");
  check_sums(kPairOp, out);
  if (bias) check_bias_shape(kPairOp, *bias, y);
  const int64_t rows = rows_of(x);
  STD_TORCH_CHECK(rows_of(y) == rows, kPairOp, ": y must have ", rows, " rows, got ", rows_of(y));
  const int64_t n_rows = checked_rows_read(kPairOp, rows, step, phase);
  check_elements(kPairOp, out, "out", 2 * n_rows);

  RowSumsqArgs first = rows_to_read(dtype, x, std::nullopt, n_rows, step, phase);
  RowSumsqArgs second = rows_to_read(dtype, y, bias, n_rows, step, phase);
  const int64_t bytes = n_rows * static_cast<int64_t>(is_double ? sizeof(double) : sizeof(float));
  first.out = out.mutable_data_ptr();
  second.out = static_cast<char*>(first.out) + bytes;
  const RowSumsqPair pair = {{first, second}};
  const int64_t elements = first.in_features + second.in_features;
  run_rows<row_sumsq_pair_cpu, launch_row_sumsq_pair>(kPairOp, x, pair, n_rows, elements, kReadGrain);
}

}  // namespace
}  // namespace plop_ext

PLOP_REGISTER("row_sumsq_", plop_ext::row_sumsq)
PLOP_REGISTER("row_sumsq_pair_", plop_ext::row_sumsq_pair)
