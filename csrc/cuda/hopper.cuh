// Hopper's instructions (sm_90a): tiles from global to shared memory by the copy engine, barriers in shared memory that
// count its bytes, and matrix products of a warpgroup (wgmma).
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace plop_ext {

constexpr int kGroupThreads = 128;  // of a warpgroup

// A tile in shared memory has rows of 128 bytes, which the copy engine writes and wgmma reads with 128-byte swizzling.
constexpr int kSwizzledBytes = 128;
constexpr int kTileAlignment = 1024;  // of its address: eight rows, after which the swizzle repeats

// One wgmma instruction: m64n256k16.
constexpr int kProductRows = 64;
constexpr int kProductColumns = 256;
constexpr int kProductDepth = 16;
// Float32 accumulators per thread of a warpgroup.
constexpr int kAccumulators = kProductRows * kProductColumns / kGroupThreads;
using Accumulators = float[kAccumulators];

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// --- barriers ---

__device__ __forceinline__ void init_barrier(uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Makes the barriers that this thread initialized visible to the other block of the cluster and to the copy engine.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and makes the phase wait for `bytes` from the copy engine.
__device__ __forceinline__ void expect_bytes(uint64_t& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// Arrives, if `arrives`, at the same barrier in the shared memory of block `block` of the cluster.
__device__ __forceinline__ void arrive_in(uint64_t& barrier, uint32_t block, bool arrives) {
  asm volatile(
      "{\n"
      ".reg .pred arrives;\n"
      ".reg .b32 there;\n"
      "setp.ne.b32 arrives, %2, 0;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "@arrives mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(block), "r"(static_cast<int>(arrives))
      : "memory");
}

// Waits until the phase of this parity has completed.
__device__ __forceinline__ void await_phase(uint64_t& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// A barrier among the `threads` that call it with this id, 1 to 15.
__device__ __forceinline__ void sync_threads(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ uint32_t rank_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// --- copies; a box lies at (column, row) of its matrix ---

__device__ __forceinline__ void load_box(void* to, const CUtensorMap& map, int column, int row, uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row)
      : "memory");
}

// Multicast: into the same place of every block that `blocks` has a bit for; the same barrier of each counts the bytes.
__device__ __forceinline__ void load_box_in(uint16_t blocks, void* to, const CUtensorMap& map, int column, int row,
                                            uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

// Called by each thread that wrote to shared memory, before the barrier after which one thread calls `store_box`.
__device__ __forceinline__ void publish_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void store_box(const CUtensorMap& map, const void* from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(column), "r"(row)
               : "memory");
}

__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until the stores have read shared memory, so that it may be written again.
__device__ __forceinline__ void await_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Waits until the stores are complete.
__device__ __forceinline__ void await_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Four matrices of 8 x 8 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&values)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(values[0]),
               "r"(values[1]), "r"(values[2]), "r"(values[3])
               : "memory");
}

// --- matrix products ---

// A descriptor counts bytes in units of 16: kProductDepth 16-bit elements further along the rows are 2 more.
constexpr int kDescriptorUnit = 16;

// wgmma's descriptor of a swizzled tile at a multiple of kTileAlignment.
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile) {
  constexpr uint64_t kSwizzled128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{kTileAlignment / kDescriptorUnit} << 32;
  constexpr uint64_t kUnused = uint64_t{1} << 16;
  return kSwizzled128 | kEightRows | kUnused | ((shared_address(tile) & 0x3ffff) / kDescriptorUnit);
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kRunning committed groups are in flight.
template <int kRunning>
__device__ __forceinline__ void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kRunning) : "memory");
}
// Waits until all products are in `d`: the compiler may move a read of registers ahead of a wait that does not name
// them.
__device__ __forceinline__ void await_products(Accumulators& d) {
  await_products<0>();
#pragma unroll
  for (float& sum : d) asm volatile("" : "+f"(sum)::"memory");
}

#define PLOP_D8(i)                                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define PLOP_D64(i)                                                                                                \
  PLOP_D8(i), PLOP_D8(i + 8), PLOP_D8(i + 16), PLOP_D8(i + 24), PLOP_D8(i + 32), PLOP_D8(i + 40), PLOP_D8(i + 48), \
      PLOP_D8(i + 56)
#define PLOP_PRODUCT(type)                                                                                     \
  asm volatile(                                                                                                \
      "{\n"                                                                                                    \
      ".reg .pred adds;\n"                                                                                     \
      "setp.ne.b32 adds, %130, 0;\n"                                                                           \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                             \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "   \
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "   \
      "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "   \
      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, " \
      "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, " \
      "%119, %120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, adds, 1, 1, 0, 0;\n"                 \
      "}"                                                                                                      \
      : PLOP_D64(0), PLOP_D64(64)                                                                              \
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)))

// d = a b^T, or with `adds` d + a b^T; a is kProductRows x kProductDepth, b kProductColumns x kProductDepth.
template <typename T>
__device__ __forceinline__ void multiply_tiles(Accumulators& d, uint64_t a, uint64_t b, bool adds);
template <>
__device__ __forceinline__ void multiply_tiles<__half>(Accumulators& d, uint64_t a, uint64_t b, bool adds) {
  PLOP_PRODUCT("f16");
}
template <>
__device__ __forceinline__ void multiply_tiles<__nv_bfloat16>(Accumulators& d, uint64_t a, uint64_t b, bool adds) {
  PLOP_PRODUCT("bf16");
}
#undef PLOP_PRODUCT
#undef PLOP_D64
#undef PLOP_D8

// Raises (take) or lowers (give) the number of registers that a thread of this warpgroup may use.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace plop_ext
