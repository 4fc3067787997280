// How kernels reach a stream: by the type of their elements, in grids no larger than a device takes, close behind the
// kernel in front of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../types.h"

namespace plop_ext {

constexpr int64_t kMaxGrid = int64_t{1} << 30;

// The first statement of every kernel: what `launch` starts may be on a multiprocessor before the kernel in front of it
// has written its last result.
__device__ __forceinline__ void await_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

inline bool launches_ahead() {
#ifdef PLOP_LAUNCHES_IN_ORDER  // PTX from before Hopper is among what was built, and does not wait if it runs there
  return false;
#else
  int device = 0;
  int major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
#endif
}

// Enqueues a kernel. From Hopper on it is set up while the one in front of it ends (programmatic dependent launch),
// which saves 1.4 us of every launch behind a matrix product on an H200. Errors show in `launch_error`.
template <typename... Parameters, typename... Arguments>
void launch_with(size_t shared_bytes, void (*kernel)(Parameters...), dim3 grid, int64_t threads, cudaStream_t stream,
                 const Arguments&... arguments) {
  cudaLaunchAttribute ahead = {};
  ahead.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  ahead.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &ahead;
  config.numAttrs = launches_ahead() ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int64_t threads, cudaStream_t stream,
            const Arguments&... arguments) {
  launch_with(0, kernel, grid, threads, stream, arguments...);
}

// CUDA's text for a launch that failed, or nullptr.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Calls `enqueue(first row, grid)` until all rows have a block; a block takes `rows_per_block` of them.
template <typename Enqueue>
void for_grids(int64_t n_rows, int64_t rows_per_block, Enqueue enqueue) {
  for (int64_t row = 0; row < n_rows; row += kMaxGrid * rows_per_block) {
    const int64_t blocks = (n_rows - row + rows_per_block - 1) / rows_per_block;
    enqueue(row, dim3(static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid)));
  }
}

// Calls `enqueue` with a value of the type, of at most 32 bits, that `dtype` names; returns what went wrong, or
// nullptr.
template <typename Enqueue>
const char* for_narrow_type(DType dtype, Enqueue enqueue) {
  switch (dtype) {
    case DType::kFloat32:
      enqueue(float{});
      break;
    case DType::kFloat16:
      enqueue(__half{});
      break;
    case DType::kBFloat16:
      enqueue(__nv_bfloat16{});
      break;
    case DType::kFloat64:
      return "float64 has no kernel";
  }
  return launch_error();
}

}  // namespace plop_ext
