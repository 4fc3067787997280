// Argument checks of the ops, in one order: device, dtype, rank, sizes, range.
// Every message reads "op: arg must be <expected>, got <actual>".
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "types.h"

namespace plop_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline std::string device_name(const Tensor& t) {
  return t.is_cpu() ? std::string("cpu") : "cuda:" + std::to_string(t.get_device_index());
}

inline void check_same_device(const char* op, const Tensor& t, const char* name, const Tensor& other) {
  STD_TORCH_CHECK(same_device(t, other), op, ": ", name, " must be on ", device_name(other), ", got ", device_name(t));
}

inline void check_dim(const char* op, const Tensor& t, const char* name, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got ", t.dim());
}

inline void check_contiguous(const char* op, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous, got a strided view");
}

inline void check_dtype(const char* op, const Tensor& t, const char* name, ScalarType expected) {
  STD_TORCH_CHECK(t.scalar_type() == expected, op, ": ", name, " must be ", torch::headeronly::toString(expected),
                  ", got ", torch::headeronly::toString(t.scalar_type()));
}

inline DType element_type(const char* op, const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float64, float16 or bfloat16, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

}  // namespace plop_ext
