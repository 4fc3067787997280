// The current CUDA stream of a device, as a void*.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

// Defined in libtorch_cuda. Weak, so that one library serves CPU and CUDA builds of torch: in a CPU build it is null,
// and no CUDA tensor reaches the ops.
#pragma weak aoti_torch_get_current_cuda_stream

namespace plop_ext {

inline void* current_cuda_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "plop_ext: this build of torch has no CUDA streams");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "plop_ext: torch did not return the current CUDA stream of device ", device);
  return stream;
}

}  // namespace plop_ext
