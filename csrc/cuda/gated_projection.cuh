// The device half of gated_projection_: both matrix products of a gated MLP, with the activation and the product of the
// two in their epilogue, so that gate and up never reach memory. Bound by the tensor cores. Hopper only.
//
// A persistent kernel: each cluster of two blocks takes tiles of 256 rows x 128 features until none is left, each block
// 128 of the rows, of gate and of up. One warpgroup is the producer: one of its threads keeps the loads of four stages
// of tiles in flight, x for its own block and gate's weights or up's for both blocks. Two warpgroups are consumers, 64
// rows each. They synchronize only when a stage is used up, so one multiplies while the other is in its epilogue.
#pragma once

#include "../gated_projection.h"
#include "activation.cuh"
#include "elements.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace plop_ext {

constexpr int kBlocks = 2;      // of a cluster
constexpr int kTileRows = 128;  // of a block
constexpr int kTileFeatures = static_cast<int>(kProjectionTile);
constexpr int kStages = 4;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kGroupRows = kTileRows / kConsumers;
constexpr int kThreads = (kConsumers + 1) * kGroupThreads;
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
// Row tiles per band. A band visits all feature tiles before the next starts, so its rows of x stay in L2.
constexpr int kBandTiles = 8;

// Elements along K, or features of out, of a box: a row of it is as wide as a swizzled tile.
constexpr int kElementBytes = 2;
constexpr int kBoxWidth = kSwizzledBytes / kElementBytes;
constexpr int kBoxVectors = kSwizzledBytes / kVectorBytes;  // vectors of such a row

// An accumulator of up lies kUpOffset behind that of gate for the same row and feature: the rows of both weight tiles
// are one operand, gate's first.
constexpr int kUpOffset = kAccumulators / 2;
static_assert(kGroupRows == kProductRows && 2 * kTileFeatures == kProductColumns);

constexpr int kSumThreads = 256;

template <typename T>
struct Shared {
  struct Stage {
    T x[kTileRows * kBoxWidth];
    T gate[kTileFeatures * kBoxWidth];
    T up[kTileFeatures * kBoxWidth];  // right behind gate: together they are one operand
  } stages[kStages];
  T out[kConsumers][kTileFeatures / kBoxWidth][kGroupRows * kBoxWidth];
  uint64_t full[kStages];
  uint64_t free[kStages];
};

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

// The tiles of one cluster, in the order it works on them.
struct Tiles {
  int next;
  const int apart;
  const Sizes& sizes;

  __device__ Tiles(const Sizes& sizes) : next(blockIdx.x / kBlocks), apart(gridDim.x / kBlocks), sizes(sizes) {}

  // Sets `place` to this block's part of the next tile; false: none is left.
  __device__ bool take(Place& place) {
    if (next >= sizes.row_tiles * sizes.feature_tiles) return false;
    const int band = next / (kBandTiles * sizes.feature_tiles);
    const int within = next - band * kBandTiles * sizes.feature_tiles;
    const int height = min(kBandTiles, sizes.row_tiles - band * kBandTiles);
    const int column = within / height;
    const int row_tile = (band * kBandTiles + within - column * height) * kBlocks + static_cast<int>(rank_in_cluster());
    place = {row_tile * kTileRows, column * kTileFeatures};
    next += apart;
    return true;
  }
};

// The stage in turn. The parity of its barriers' phases flips each time around the ring.
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

// The producer, one thread: fills each stage as soon as both blocks' consumers have freed it.
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
      await_phase(shared.free[turn.stage], turn.parity ^ 1);  // returns at once in the first round
      expect_bytes(full, sizeof(stage));
      load_box(stage.x, maps.x, depth * kBoxWidth, place.row, full);
      if (rank == 0) {
        load_box_in(kBoth, stage.gate, maps.gate, depth * kBoxWidth, place.feature, full);
      } else {
        load_box_in(kBoth, stage.up, maps.up, depth * kBoxWidth, place.feature, full);
      }
      turn.advance();
    }
  }
}

// A consumer's products: gate and up of its 64 rows, accumulated along K.
template <typename T>
__device__ __forceinline__ void multiply_stages(Accumulators& d, Shared<T>& shared, int depths, int group, Turn& turn) {
  constexpr int kStep = kProductDepth * sizeof(T) / kDescriptorUnit;
  const int lane = threadIdx.x % kGroupThreads;
  int before = 0;
  for (int depth = 0; depth < depths; ++depth) {
    auto& stage = shared.stages[turn.stage];
    await_phase(shared.full[turn.stage], turn.parity);
    const uint64_t x = tile_descriptor(stage.x + group * kGroupRows * kBoxWidth);
    const uint64_t weights = tile_descriptor(stage.gate);
    begin_products();
#pragma unroll
    for (int part = 0; part < kBoxWidth / kProductDepth; ++part) {
      multiply_tiles<T>(d, x + part * kStep, weights + part * kStep, depth > 0 || part > 0);
    }
    commit_products();
    // The stage before is free once its products are done; one thread per block of the cluster says so to that block.
    await_products<1>();
    arrive_in(shared.free[before], lane % kBlocks, depth > 0 && lane < kBlocks);
    before = turn.stage;
    turn.advance();
  }
  await_products(d);
  arrive_in(shared.free[before], lane % kBlocks, lane < kBlocks);
}

// The accumulators of a thread: rows and features of its warpgroup's part of the tile
//
//   thread t of the warpgroup: warp w = t / 32, lane l = t % 32
//
//                        features 0..7           8..15       ...  120..127
//                     lane%4: 0   1   2   3
//                     +-----------------------+-----------+-----+-----------+
//   row 16w     + l/4 |  d[0] d[1]  of lane l | d[4] d[5] | ... | d[60 61]  |  gate
//   row 16w + 8 + l/4 |  d[2] d[3]            | d[6] d[7] | ... | d[62 63]  |
//                     +-----------------------+-----------+-----+-----------+
//
//   lane l has features 2 * (l % 4) and the next one of every 8; d[kUpOffset + i] is up where d[i] is gate.
//   So d[i] is of row 16w + 8 * (i / 2 % 2) + l / 4 and of feature 8 * (i / 4) + 2 * (l % 4) + i % 2.
constexpr int kWarpRows = 16;
constexpr int kMatrix = 8;              // rows, and features, of a matrix that `store_matrices` stores
constexpr int kMatrixAccumulators = 4;  // of a thread: two features in each of two matrices, one above the other
constexpr int kMatrixLanes = 4;         // lanes that share a row

// Clears the features of a tile from `from` on: there are no weights, and infinity times zero is NaN.
__device__ __forceinline__ void clear_features(Accumulators& d, int from) {
#pragma unroll
  for (int at = 0; at < kUpOffset; ++at) {
    if (at / kMatrixAccumulators * kMatrix < from) continue;
    d[at] = 0.0f;
    d[at + kUpOffset] = 0.0f;
  }
}

// The byte offset of 16-byte vector `vector` of row `row` in a box with 128-byte swizzling: the vectors of a row are
// permuted by the row's place among eight, so that neither the copy engine nor `store_matrices` meets bank conflicts.
//
//            place  0 1 2 3 4 5 6 7
//   row 0   vector  0 1 2 3 4 5 6 7
//   row 1           1 0 3 2 5 4 7 6
//   row 2           2 3 0 1 6 7 4 5
//   ...
//   row 7           7 6 5 4 3 2 1 0        place = vector ^ (row % 8)
__device__ __forceinline__ int swizzled(int row, int vector) { return (vector ^ (row % kBoxVectors)) * kVectorBytes; }

// The epilogue: activates, multiplies and stores 64 rows of 128 features, and leaves the sums over these features.
template <typename T, Activation kActivation>
__device__ __forceinline__ void finish_tile(Accumulators& d, Shared<T>& shared, const CUtensorMap& out_map,
                                            const Sizes& sizes, Place place, int group, float* __restrict__ partials) {
  using Pair = typename Pairwise<T>::type;
  const int thread = threadIdx.x % kGroupThreads;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  // Of the four matrices that `store_matrices` takes, lanes 0 to 7 and 8 to 15 address the rows of the upper and the
  // lower one, lanes 16 to 31 those of the next 8 features.
  const int row = warp * kWarpRows + (lane / kMatrix % 2) * kMatrix + lane % kMatrix;
  const uint32_t out_row = shared_address(shared.out[group][0]) + row * kBoxWidth * sizeof(T);
  const int features = sizes.features - place.feature;
  if (features < kTileFeatures) clear_features(d, features);
  if (thread == 0) await_stores_read();
  sync_threads(1 + group, kGroupThreads);
  float sums[kProjectionSums][2] = {};  // of gate, up and out; of the upper row and the lower one
#pragma unroll
  for (int chunk = 0; chunk < kTileFeatures / kMatrix; chunk += 2) {
    uint32_t products[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i % 2;
      const int at = kMatrixAccumulators * (chunk + i / 2) + 2 * half;
      const Pair gate = Pairwise<T>::from(d[at], d[at + 1]);
      const Pair up = Pairwise<T>::from(d[at + kUpOffset], d[at + kUpOffset + 1]);
      const float gate0 = element(reinterpret_cast<const T*>(&gate), 0);
      const float gate1 = element(reinterpret_cast<const T*>(&gate), 1);
      const float up0 = element(reinterpret_cast<const T*>(&up), 0);
      const float up1 = element(reinterpret_cast<const T*>(&up), 1);
      const Pair act = Pairwise<T>::from(activated<T, kActivation>(gate0), activated<T, kActivation>(gate1));
      const Pair product = Pairwise<T>::multiply(act, up);
      const float product0 = element(reinterpret_cast<const T*>(&product), 0);
      const float product1 = element(reinterpret_cast<const T*>(&product), 1);
      sums[0][half] = fmaf(gate1, gate1, fmaf(gate0, gate0, sums[0][half]));
      sums[1][half] = fmaf(up1, up1, fmaf(up0, up0, sums[1][half]));
      sums[2][half] = fmaf(product1, product1, fmaf(product0, product0, sums[2][half]));
      products[i] = reinterpret_cast<const uint32_t&>(product);
    }
    const int box = chunk / kBoxVectors;
    const int vector = chunk % kBoxVectors + lane / (2 * kMatrix);
    store_matrices(out_row + box * kGroupRows * kBoxWidth * sizeof(T) + swizzled(row, vector), products);
  }
  publish_stores();
  sync_threads(1 + group, kGroupThreads);
  const int first_row = place.row + group * kGroupRows;
  if (thread == 0) {
#pragma unroll
    for (int box = 0; box < kTileFeatures / kBoxWidth; ++box) {
      store_box(out_map, shared.out[group][box], place.feature + box * kBoxWidth, first_row);
    }
    commit_stores();
  }
  if (partials == nullptr) return;
  partials += static_cast<int64_t>(place.feature / kTileFeatures) * kProjectionSums * sizes.rows;
#pragma unroll
  for (int which = 0; which < kProjectionSums; ++which) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = group_sum<kMatrixLanes>(sums[which][half]);
      const int of = first_row + warp * kWarpRows + half * kMatrix + lane / kMatrixLanes;
      if (lane % kMatrixLanes == 0 && of < sizes.rows) partials[static_cast<int64_t>(which) * sizes.rows + of] = sum;
    }
  }
}

template <typename T, Activation kActivation>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    gated_projection_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Sizes sizes,
                            float* __restrict__ partials) {
  await_previous_kernel();
  extern __shared__ unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<T>*>(memory + (kTileAlignment - shared_address(memory) % kTileAlignment) %
                                                            kTileAlignment);
  const int group = threadIdx.x / kGroupThreads;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(shared.full[stage], 1);
      init_barrier(shared.free[stage], kConsumers * kBlocks);
    }
    publish_barriers();
  }
  sync_cluster();
  if (group == kConsumers) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x % kGroupThreads == 0) copy_tiles(shared, maps, sizes);
  } else {
    take_registers<kConsumerRegisters>();
    Turn turn;
    Tiles tiles(sizes);
    Place place;
    Accumulators d;
    while (tiles.take(place)) {
      multiply_stages(d, shared, sizes.depths, group, turn);
      finish_tile<T, kActivation>(d, shared, maps.out, sizes, place, group, partials);
    }
    if (threadIdx.x % kGroupThreads == 0) await_stores();
  }
  sync_cluster();  // until here the other block may still copy into this one's memory, and arrive at its barriers
}

// Adds up the sums of all feature tiles of a row, in one order.
__global__ void __launch_bounds__(kSumThreads)
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
  for (int tile = 0; tile < tiles; ++tile) sum += partials[int64_t{tile} * kProjectionSums * rows];
  sums[place] = sum;
}

}  // namespace plop_ext
