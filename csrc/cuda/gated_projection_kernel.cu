// The host half of gated_projection_: tensor maps and launches. The kernels are in gated_projection.cuh; this file is
// compiled for Hopper alone, and without PLOP_SM90A if Hopper is not among the architectures.
#include "../gated_projection.h"

#ifdef PLOP_SM90A
#include <algorithm>

#include "gated_projection.cuh"
#include "launch.cuh"
#endif

namespace plop_ext {
#ifdef PLOP_SM90A
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's encoder of tensor maps, or nullptr. The library does not link the driver, so that it loads without one.
Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) cudaGetLastError();  // or `launch_error` would report it for the next launch
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return found;
}

// Describes a row-major matrix of 16-bit elements that is read or written in boxes of `box_rows` x kBoxWidth. Elements
// outside of the matrix are read as zero and not written.
bool encode(CUtensorMap& map, DType dtype, const void* data, int64_t rows, int64_t columns, int box_rows) {
  const CUtensorMapDataType type =
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns) * kElementBytes};
  const cuuint32_t box[2] = {kBoxWidth, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t every[2] = {1, 1};
  return encoder()(&map, type, 2, const_cast<void*>(data), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename T, Activation kActivation>
void enqueue(const GatedProjectionArgs& args, const Maps& maps, const Sizes& sizes, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(Shared<T>) + kTileAlignment;
  auto* kernel = gated_projection_kernel<T, kActivation>;
  int device = 0;
  int processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  const int64_t clusters = std::min<int64_t>(int64_t{sizes.row_tiles} * sizes.feature_tiles, processors / kBlocks);
  launch_with(kSharedBytes, kernel, dim3(static_cast<unsigned>(clusters * kBlocks)), kThreads, stream, maps, sizes,
              args.workspace);
}

}  // namespace

bool has_gated_projection() {
  int device = 0;
  int major = 0;
  int minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0 && encoder() != nullptr;
}

const char* launch_gated_projection(const GatedProjectionArgs& args, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  constexpr int kClusterRows = kBlocks * kTileRows;
  const Sizes sizes = {
      static_cast<int>(args.n_rows),
      static_cast<int>(args.features),
      static_cast<int>((args.in_features + kBoxWidth - 1) / kBoxWidth),
      static_cast<int>((args.n_rows + kClusterRows - 1) / kClusterRows),
      static_cast<int>((args.features + kTileFeatures - 1) / kTileFeatures),
  };
  Maps maps;
  if (!encode(maps.x, args.dtype, args.x, args.n_rows, args.in_features, kTileRows) ||
      !encode(maps.gate, args.dtype, args.gate_weight, args.features, args.in_features, kTileFeatures) ||
      !encode(maps.up, args.dtype, args.up_weight, args.features, args.in_features, kTileFeatures) ||
      !encode(maps.out, args.dtype, args.out, args.n_rows, args.features, kGroupRows)) {
    return "the driver takes no tensor map of these sizes";
  }
  if (args.dtype == DType::kFloat16) {
    args.activation == Activation::kSilu ? enqueue<__half, Activation::kSilu>(args, maps, sizes, stream)
                                         : enqueue<__half, Activation::kGeluTanh>(args, maps, sizes, stream);
  } else {
    args.activation == Activation::kSilu ? enqueue<__nv_bfloat16, Activation::kSilu>(args, maps, sizes, stream)
                                         : enqueue<__nv_bfloat16, Activation::kGeluTanh>(args, maps, sizes, stream);
  }
  const int64_t read = rows_read(args.n_rows, args.step, args.phase);
  if (args.workspace != nullptr && read > 0) {
    launch(sum_gated_projection_kernel,
           dim3(static_cast<unsigned>((read + kSumThreads - 1) / kSumThreads), kProjectionSums), kSumThreads, stream,
           args.workspace, sizes.feature_tiles, args.n_rows, read, args.step, args.phase, args.gate_sumsq,
           args.up_sumsq, args.out_sumsq);
  }
  return launch_error();
}

#else  // a build without Hopper

bool has_gated_projection() { return false; }

const char* launch_gated_projection(const GatedProjectionArgs&, void*) { return "the library is built without Hopper"; }

#endif
}  // namespace plop_ext
