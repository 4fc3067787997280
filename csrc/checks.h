// Argument checks of the ops, in one order: device, dtype, rank, sizes, layout, range.
// Every message reads "op: arg must be <expected>, got <actual>".
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

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

struct Argument {
  const char* name;
  const Tensor* tensor;
  int64_t dim;
};

using Arguments = std::vector<Argument>;

inline void add_given(Arguments& arguments, const char* name, const std::optional<Tensor>& t, int64_t dim) {
  if (t) arguments.push_back({name, &*t, dim});
}

inline Arguments joined(Arguments first, const Arguments& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

template <typename Sizes>
std::string listed(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return text;
}

// Device, dtype and rank: `first` sets device and dtype, `tensors` share both, `sums` are float32.
inline DType check_fused(const char* op, const Argument& first, const Arguments& tensors, const Arguments& sums) {
  for (const Argument& a : tensors) check_same_device(op, *a.tensor, a.name, *first.tensor);
  for (const Argument& a : sums) check_same_device(op, *a.tensor, a.name, *first.tensor);
  const ScalarType type = first.tensor->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op, ": ",
                  first.name, " must be float32, float16 or bfloat16, got ", torch::headeronly::toString(type));
  for (const Argument& a : tensors) check_dtype(op, *a.tensor, a.name, type);
  for (const Argument& a : sums) check_dtype(op, *a.tensor, a.name, ScalarType::Float);
  check_dim(op, *first.tensor, first.name, first.dim);
  for (const Argument& a : tensors) check_dim(op, *a.tensor, a.name, a.dim);
  for (const Argument& a : sums) check_dim(op, *a.tensor, a.name, a.dim);
  return element_type(op, *first.tensor, first.name);
}

inline void check_shape(const char* op, const Tensor& t, const char* name, const std::vector<int64_t>& shape) {
  const auto sizes = t.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), op, ": ", name,
                  " must have shape [", listed(shape), "], got [", listed(sizes), "]");
}

inline void check_elements(const char* op, const Tensor& t, const char* name, int64_t elements) {
  STD_TORCH_CHECK(t.size(0) == elements, op, ": ", name, " must have ", elements, " elements, got ", t.size(0));
}

inline void check_aligned(const char* op, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.storage_offset() % kVector == 0, op, ": ", name, " must start at a multiple of ", kVector,
                  " elements, got offset ", t.storage_offset());
  // Storage that another library allocated may start anywhere; a misaligned vectorized access ends the process's CUDA
  // context.
  const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  STD_TORCH_CHECK(!t.is_cuda() || address % kVectorBytes == 0, op, ": ", name, " must start at a multiple of ",
                  kVectorBytes, " bytes of memory, got ", address % kVectorBytes, " past one");
}

// Checks step and phase and returns the number of rows read.
inline int64_t checked_rows_read(const char* op, int64_t rows, int64_t step, int64_t phase) {
  STD_TORCH_CHECK(step >= 1, op, ": step must be at least 1, got ", step);
  STD_TORCH_CHECK(phase >= 0 && phase < step, op, ": phase must be in [0, step), got ", phase);
  return rows_read(rows, step, phase);
}

// Step, phase, and one element of each of `sums` per row read.
inline void check_rows(const char* op, const Arguments& sums, int64_t rows, int64_t step, int64_t phase) {
  const int64_t read = checked_rows_read(op, rows, step, phase);
  for (const Argument& a : sums) check_elements(op, *a.tensor, a.name, read);
}

inline const void* data_or_null(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

inline void* mutable_data_or_null(const std::optional<Tensor>& t) { return t ? t->mutable_data_ptr() : nullptr; }

}  // namespace plop_ext
