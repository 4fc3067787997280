// Both matrix products of a gated MLP with the activation and the product of the two in their epilogue: gate and up
// never reach memory. Bound by the tensor cores.
//
// A cluster of two blocks computes 256 rows of 128 features; each block 128 of the rows, of gate and of up. One warp
// keeps four stages of tiles on their way from memory: x of its own rows, and gate's weights or up's for both blocks.
// Two warpgroups multiply, 64 rows each. They wait for each other only where a stage is used up, so that one multiplies
// while the other one is in its epilogue. In registers an element of gate lies 64 before the one of up it belongs to.
#include "../gated_projection.h"

#ifdef PLOP_SM90A
#include <algorithm>

#include "activation.cuh"
#include "elements.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#endif

namespace plop_ext {
#ifdef PLOP_SM90A
namespace {

constexpr int kBlocks = 2;      // of a cluster
constexpr int kTileRows = 128;  // of a block
constexpr int kTileFeatures = static_cast<int>(kProjectionTile);
constexpr int kDepth = 64;  // of K, in a stage: 128 bytes, the width of a swizzled tile
constexpr int kStages = 4;
constexpr int kGroups = 2;  // warpgroups that multiply
constexpr int kGroupThreads = 128;
constexpr int kGroupRows = kTileRows / kGroups;
constexpr int kThreads = (kGroups + 1) * kGroupThreads;
constexpr int kCopyRegisters = 40;
constexpr int kProductRegisters = 232;
// Clusters' tiles of rows that run through all features before the next ones do: their part of x stays in the L2 cache.
constexpr int kRowTiles = 8;

template <typename T>
struct Shared {
  struct Stage {
    T x[kTileRows * kDepth];
    T gate[kTileFeatures * kDepth];
    T up[kTileFeatures * kDepth];  // right behind gate: together they are one operand
  } stages[kStages];
  T out[kGroups][kTileFeatures / kDepth][kGroupRows * kDepth];
  uint64_t full[kStages];
  uint64_t free[kStages];
};
constexpr int kAlignment = 1024;  // of swizzled tiles

struct Sizes {
  int rows;
  int features;
  int depths;     // stages along K
  int row_tiles;  // of a cluster
  int feature_tiles;
};

struct Maps {
  CUtensorMap x;
  CUtensorMap gate;
  CUtensorMap up;
  CUtensorMap out;
};

struct Place {
  int row;
  int feature;
};

// The tiles of a cluster, one after the other.
struct Tiles {
  int next;
  const int apart;
  const Sizes& sizes;

  __device__ Tiles(const Sizes& sizes) : next(blockIdx.x / kBlocks), apart(gridDim.x / kBlocks), sizes(sizes) {}

  __device__ bool take(Place& place) {
    if (next >= sizes.row_tiles * sizes.feature_tiles) return false;
    const int band = next / (kRowTiles * sizes.feature_tiles);
    const int within = next - band * kRowTiles * sizes.feature_tiles;
    const int height = min(kRowTiles, sizes.row_tiles - band * kRowTiles);
    const int column = within / height;
    const int row_tile = (band * kRowTiles + within - column * height) * kBlocks + static_cast<int>(rank_in_cluster());
    place = {row_tile * kTileRows, column * kTileFeatures};
    next += apart;
    return true;
  }
};

// Goes around the stages; the parity of their barriers' phases changes with each round.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// One thread: keeps the stages full.
template <typename T>
__device__ void copy_tiles(Shared<T>& shared, const Maps& maps, const Sizes& sizes) {
  const uint32_t rank = rank_in_cluster();
  constexpr uint16_t kBoth = (1 << kBlocks) - 1;
  Turn turn;
  Tiles tiles(sizes);
  Place place;
  while (tiles.take(place)) {
    for (int depth = 0; depth < sizes.depths; ++depth) {
      auto& stage = shared.stages[turn.stage];
      uint64_t& full = shared.full[turn.stage];
      await_phase(shared.free[turn.stage], turn.parity ^ 1);  // at once in the first round
      expect_bytes(full, sizeof(stage));
      load_box(stage.x, maps.x, depth * kDepth, place.row, full);
      if (rank == 0) {
        load_box_in(kBoth, stage.gate, maps.gate, depth * kDepth, place.feature, full);
      } else {
        load_box_in(kBoth, stage.up, maps.up, depth * kDepth, place.feature, full);
      }
      turn.advance();
    }
  }
}

// Gate and up of 64 rows, summed along K.
template <typename T>
__device__ __forceinline__ void multiply_stages(float (&d)[128], Shared<T>& shared, int depths, int group, Turn& turn) {
  constexpr int kProductDepth = 16;
  constexpr int kStep = kProductDepth * sizeof(T) / 16;  // of descriptors
  const int lane = threadIdx.x % kGroupThreads;
  int before = 0;
  for (int depth = 0; depth < depths; ++depth) {
    auto& stage = shared.stages[turn.stage];
    await_phase(shared.full[turn.stage], turn.parity);
    const uint64_t x = tile_descriptor(stage.x + group * kGroupRows * kDepth);
    const uint64_t weights = tile_descriptor(stage.gate);
    begin_products();
#pragma unroll
    for (int part = 0; part < kDepth / kProductDepth; ++part) {
      multiply_tiles<T>(d, x + part * kStep, weights + part * kStep, depth > 0 || part > 0);
    }
    commit_products();
    await_products<1>();
    arrive_in(shared.free[before], lane % kBlocks, depth > 0 && lane < kBlocks);
    before = turn.stage;
    turn.advance();
  }
  await_products(d);
  arrive_in(shared.free[before], lane % kBlocks, lane < kBlocks);
}

// Of a tile with features past the last one: there are no weights there, and infinity times zero is NaN.
__device__ __forceinline__ void clear_features(float (&d)[128], int from) {
#pragma unroll
  for (int at = 0; at < 64; ++at) {
    if (at / 4 * 8 < from) continue;
    d[at] = 0.0f;
    d[at + 64] = 0.0f;
  }
}

// Activates, multiplies and stores 64 rows of 128 features, and leaves the sums over these features.
template <typename T, Activation kActivation>
__device__ __forceinline__ void finish_tile(float (&d)[128], Shared<T>& shared, const CUtensorMap& out_map,
                                            const Sizes& sizes, Place place, int group, float* __restrict__ partials) {
  using Pair = typename Pairwise<T>::type;
  const int thread = threadIdx.x % kGroupThreads;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  // Matrices of 8 x 8: rows 0 to 7 and 8 to 15 of this warp, then those of the next 8 features.
  const int row = warp * 16 + (lane / 8 % 2) * 8 + lane % 8;
  const uint32_t out_row = shared_address(shared.out[group][0]) + row * kDepth * sizeof(T);
  const int features = sizes.features - place.feature;
  if (features < kTileFeatures) clear_features(d, features);
  if (thread == 0) await_stores_read();
  sync_threads(1 + group, kGroupThreads);
  float sums[3][2] = {};
#pragma unroll
  for (int chunk = 0; chunk < kTileFeatures / 8; chunk += 2) {
    uint32_t products[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 4 * (chunk + i / 2) + 2 * (i % 2);
      const Pair gate = Pairwise<T>::from(d[at], d[at + 1]);
      const Pair up = Pairwise<T>::from(d[at + 64], d[at + 65]);
      const float gate0 = element(reinterpret_cast<const T*>(&gate), 0);
      const float gate1 = element(reinterpret_cast<const T*>(&gate), 1);
      const float up0 = element(reinterpret_cast<const T*>(&up), 0);
      const float up1 = element(reinterpret_cast<const T*>(&up), 1);
      const Pair act = Pairwise<T>::from(activated<T, kActivation>(gate0), activated<T, kActivation>(gate1));
      const Pair product = Pairwise<T>::multiply(act, up);
      const float product0 = element(reinterpret_cast<const T*>(&product), 0);
      const float product1 = element(reinterpret_cast<const T*>(&product), 1);
      sums[0][i % 2] = fmaf(gate1, gate1, fmaf(gate0, gate0, sums[0][i % 2]));
      sums[1][i % 2] = fmaf(up1, up1, fmaf(up0, up0, sums[1][i % 2]));
      sums[2][i % 2] = fmaf(product1, product1, fmaf(product0, product0, sums[2][i % 2]));
      products[i] = reinterpret_cast<const uint32_t&>(product);
    }
    const int box = chunk / 8;
    const int place_in_row = (chunk % 8 + lane / 16) ^ (row % 8);
    store_matrices(out_row + box * kGroupRows * kDepth * sizeof(T) + place_in_row * kVectorBytes, products);
  }
  publish_stores();
  sync_threads(1 + group, kGroupThreads);
  const int first_row = place.row + group * kGroupRows;
  if (thread == 0) {
#pragma unroll
    for (int box = 0; box < kTileFeatures / kDepth; ++box) {
      store_box(out_map, shared.out[group][box], place.feature + box * kDepth, first_row);
    }
    commit_stores();
  }
  if (partials == nullptr) return;
  partials += static_cast<int64_t>(place.feature / kTileFeatures) * 3 * sizes.rows;
#pragma unroll
  for (int which = 0; which < 3; ++which) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = group_sum<4>(sums[which][half]);
      const int of = first_row + warp * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0 && of < sizes.rows) partials[static_cast<int64_t>(which) * sizes.rows + of] = sum;
    }
  }
}

template <typename T, Activation kActivation>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    gated_projection_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Sizes sizes,
                            float* __restrict__ partials) {
  await_previous_kernel();
  extern __shared__ unsigned char memory[];
  auto& shared =
      *reinterpret_cast<Shared<T>*>(memory + (kAlignment - shared_address(memory) % kAlignment) % kAlignment);
  const int group = threadIdx.x / kGroupThreads;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(shared.full[stage], 1);
      init_barrier(shared.free[stage], kGroups * kBlocks);
    }
    publish_barriers();
  }
  sync_cluster();
  if (group == kGroups) {
    give_registers<kCopyRegisters>();
    if (threadIdx.x % kGroupThreads == 0) copy_tiles(shared, maps, sizes);
  } else {
    take_registers<kProductRegisters>();
    Turn turn;
    Tiles tiles(sizes);
    Place place;
    float d[128];
    while (tiles.take(place)) {
      multiply_stages(d, shared, sizes.depths, group, turn);
      finish_tile<T, kActivation>(d, shared, maps.out, sizes, place, group, partials);
    }
    if (threadIdx.x % kGroupThreads == 0) await_stores();
  }
  sync_cluster();  // the other block may still copy here, and arrive
}

// Adds the sums of all tiles of a row, in one order.
__global__ void __launch_bounds__(256)
    sum_gated_projection_kernel(const float* __restrict__ partials, int tiles, int64_t rows, int64_t read, int64_t step,
                                int64_t phase, float* __restrict__ gate_sumsq, float* __restrict__ up_sumsq,
                                float* __restrict__ out_sumsq) {
  await_previous_kernel();
  const int which = blockIdx.y;
  float* __restrict__ sums = which == 0 ? gate_sumsq : which == 1 ? up_sumsq : out_sumsq;
  const int64_t place = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (sums == nullptr || place >= read) return;
  partials += which * rows + phase + place * step;
  float sum = 0.0f;
#pragma unroll 16
  for (int tile = 0; tile < tiles; ++tile) sum += partials[int64_t{tile} * 3 * rows];
  sums[place] = sum;
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's encoder of tensor maps: the library links no driver, so that it loads where there is none.
Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) cudaGetLastError();  // else the next launch would be said to have failed
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return found;
}

// A row-major matrix of 16-bit elements, read or written in boxes of `box_rows` x 64. What lies outside of it is read
// as zero and not written.
bool encode(CUtensorMap& map, DType dtype, const void* data, int64_t rows, int64_t columns, int box_rows) {
  const CUtensorMapDataType type =
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[2] = {kDepth, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t every[2] = {1, 1};
  return encoder()(&map, type, 2, const_cast<void*>(data), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename T, Activation kActivation>
void enqueue(const GatedProjectionArgs& args, const Maps& maps, const Sizes& sizes, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(Shared<T>) + kAlignment;
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
      static_cast<int>((args.in_features + kDepth - 1) / kDepth),
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
    launch(sum_gated_projection_kernel, dim3(static_cast<unsigned>((read + 255) / 256), 3), 256, stream, args.workspace,
           sizes.feature_tiles, args.n_rows, read, args.step, args.phase, args.gate_sumsq, args.up_sumsq,
           args.out_sumsq);
  }
  return launch_error();
}

#else  // a build without Hopper

bool has_gated_projection() { return false; }

const char* launch_gated_projection(const GatedProjectionArgs&, void*) { return "the library is built without Hopper"; }

#endif
}  // namespace plop_ext
