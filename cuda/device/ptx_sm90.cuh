// Thin wrappers of the PTX that sm_90a brought: mbarriers, the bulk tensor copy engine (TMA),
// warpgroup registers and fences. One instruction a function. wgmma itself stands in ptx_wgmma.cuh.
#pragma once

#include <cuda.h>

#include "device/ptx_sm80.cuh"
#include "device/ptx_wgmma.cuh"

namespace jax_flash2::ptx {

// ---- mbarrier, for the copy engine: phases of bytes too
// Makes freshly initialised barriers visible to the copy engine.
JF2_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
// Arrives once and announces `bytes` that the copy engine will deliver in this phase.
JF2_DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// ---- Bulk copies: contiguous bytes, a multiple of 16
JF2_DEVICE void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

// ---- TMA: boxes of a 4-D tensor, coordinates innermost first
JF2_DEVICE void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}
JF2_DEVICE void tma_load_4d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int x0,
                            int x1, int x2, int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}
JF2_DEVICE void tma_store_4d(const CUtensorMap* map, uint32_t shared, int x0, int x1, int x2,
                             int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(
          map),
      "r"(shared), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}
JF2_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }
// Waits until at most `kPending` of this thread's store groups still read shared memory.
template <int kPending>
JF2_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(kPending) : "memory");
}
// Waits until at most `kPending` of this thread's store groups are still in flight.
template <int kPending>
JF2_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;\n" ::"n"(kPending) : "memory");
}
// Orders this thread's shared-memory stores before later reads by wgmma or the copy engine.
JF2_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// ---- warpgroups
template <int kRegisters>
JF2_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
JF2_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
JF2_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
JF2_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int kPending>
JF2_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of a register across a wgmma_wait.
JF2_DEVICE void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }

// A value that all lanes share, so that the compiler knows and keeps it in a uniform register.
JF2_DEVICE int uniform(int x) { return __shfl_sync(~0u, x, 0); }
// Hides how a value came about: what is computed from it is not kept in registers across a loop.
JF2_DEVICE uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- named barriers: `threads` threads meet (sync), or come by without waiting (arrive)
JF2_DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// ---- clusters: thread blocks that read each other's shared memory
JF2_DEVICE int cluster_rank() {
  int x;
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(x));
  return x;
}
// The threads of all its blocks meet, but for those that have ended. By whole warps.
JF2_DEVICE void cluster_sync() {
  __syncwarp();
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}
// The same where nothing that was written is to be seen.
JF2_DEVICE void cluster_sync_relaxed() {
  __syncwarp();
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.aligned;\n" ::
          : "memory");
}
// An address in this block's shared memory, as one in that of block `rank`.
JF2_DEVICE uint32_t shared_of_block(uint32_t shared, int rank) {
  uint32_t x;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(x) : "r"(shared), "r"(rank));
  return x;
}
JF2_DEVICE float2 ld_cluster_f32x2(uint32_t shared) {
  float2 x;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];\n"
               : "=f"(x.x), "=f"(x.y)
               : "r"(shared)
               : "memory");
  return x;
}
JF2_DEVICE float4 ld_cluster_f32x4(uint32_t shared) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(shared)
               : "memory");
  return x;
}

// ---- stmatrix: the inverse of ldmatrix
JF2_DEVICE void stmatrix_x4(uint32_t shared, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

}  // namespace jax_flash2::ptx
