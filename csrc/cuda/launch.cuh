// Launching: dispatch by element type, grids within the device's limit, programmatic dependent launch, launch checks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../types.h"

namespace plop_ext {

constexpr int64_t kMaxGrid = int64_t{1} << 30;

// The first statement of every kernel: a kernel that `launch` starts may run before the previous kernel in the stream
// has written its last result.
__device__ __forceinline__ void await_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

inline bool launches_ahead() {
#ifdef PLOP_LAUNCHES_IN_ORDER  // the library has PTX older than Hopper, which would run there without the wait
  return false;
#else
  int device = 0;
  int major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
#endif
}

// Enqueues a kernel. From Hopper on its launch overlaps the end of the previous kernel (programmatic dependent launch),
// which saves 1.4 us behind a matrix product on an H200. Errors show in `launch_error`.
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

// CUDA's text for a failed launch, or nullptr.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Calls `enqueue(first row, grid)` for as many grids as the rows need, at `rows_per_block` rows per block.
template <typename Enqueue>
void for_grids(int64_t n_rows, int64_t rows_per_block, Enqueue enqueue) {
  for (int64_t row = 0; row < n_rows; row += kMaxGrid * rows_per_block) {
    const int64_t blocks = (n_rows - row + rows_per_block - 1) / rows_per_block;
    enqueue(row, dim3(static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid)));
  }
}

// Calls `enqueue` with a value of the element type that `dtype` names, of at most 32 bits. Returns an error text or
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
