// Runs an op's kernel on the device of its tensors, and registers one function for CPU and CUDA tensors.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"
#ifdef PLOP_WITH_CUDA
#include "stream.h"
#endif

namespace plop_ext {

// Least work of a CPU task: with less, a second thread costs more than it saves.
constexpr int64_t kReadGrain = 32768;   // elements that are read and summed
constexpr int64_t kFusedGrain = 16384;  // elements that a fused op transforms
constexpr int64_t kTotalsGrain = 4096;  // rows of which gain_totals_ takes the gain

#ifdef PLOP_WITH_CUDA
// Enqueues a kernel on the current stream of the device of `x`, which the caller has made the current device.
template <auto kLaunch, typename Args>
void enqueue(const char* op, const Tensor& x, const Args& args) {
  const char* error = kLaunch(args, current_cuda_stream(x.get_device_index()));
  STD_TORCH_CHECK(error == nullptr, op, ": the CUDA kernel failed to launch: ", error);
}
#endif

// Calls kCpu(args, begin, end) for ranges of at least `grain` of `tasks`, or kLaunch(args, stream) where `x` is on
// CUDA. A build without CUDA has no kLaunch to link: a template argument that is not used leaves no reference to it.
template <auto kCpu, auto kLaunch, typename Args>
void run_tasks(const char* op, const Tensor& x, const Args& args, int64_t tasks, int64_t grain) {
  if (tasks == 0) return;
#ifdef PLOP_WITH_CUDA
  if (x.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    enqueue<kLaunch>(op, x, args);
    return;
  }
#else
  static_cast<void>(op);
  static_cast<void>(x);
#endif
  torch::stable::parallel_for(0, tasks, grain, [&args](int64_t begin, int64_t end) { kCpu(args, begin, end); });
}

// `run_tasks` for rows of `elements` each, of which a CPU task takes at least `grain`.
template <auto kCpu, auto kLaunch, typename Args>
void run_rows(const char* op, const Tensor& x, const Args& args, int64_t rows, int64_t elements, int64_t grain) {
  run_tasks<kCpu, kLaunch>(op, x, args, rows, 1 + grain / std::max(elements, int64_t{1}));
}

}  // namespace plop_ext

// Registers `function` as the kernel of `op` under every dispatch key that the library serves.
#define PLOP_REGISTER_CPU(op, function) \
  STABLE_TORCH_LIBRARY_IMPL(plop_ext, CPU, m) { m.impl(op, TORCH_BOX(&function)); }
#define PLOP_REGISTER_CUDA(op, function) \
  STABLE_TORCH_LIBRARY_IMPL(plop_ext, CUDA, m) { m.impl(op, TORCH_BOX(&function)); }
#ifdef PLOP_WITH_CUDA
#define PLOP_REGISTER(op, function) \
  PLOP_REGISTER_CPU(op, function)   \
  PLOP_REGISTER_CUDA(op, function)
#else
#define PLOP_REGISTER(op, function) PLOP_REGISTER_CPU(op, function)
#endif
