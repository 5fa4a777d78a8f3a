// Thin wrappers of the PTX that sm_80 brought: one instruction a function, named after it. The only
// place with inline assembly below the sm_90a kernels. Free of std headers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifndef JF2_DEVICE
#define JF2_DEVICE __device__ __forceinline__
#endif

namespace jax_flash2::ptx {

// A generic pointer to shared memory as the 32-bit address that the instructions below take.
JF2_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- cp.async: 16 bytes from global to shared memory, past L1. Bytes beyond `valid_bytes` (0 or
// 16) are written as zeros, and then nothing is read from `global`.
JF2_DEVICE void cp_async_16(uint32_t shared, const void* global, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global),
               "r"(valid_bytes)
               : "memory");
}
JF2_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `kPending` of this thread's newest groups are still in flight.
template <int kPending>
JF2_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// ---- ldmatrix: four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of
// matrix l / 8. `trans` hands out each matrix transposed.
JF2_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
JF2_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

// ---- plain shared-memory accesses by 32-bit address
JF2_DEVICE float lds_f32(uint32_t shared) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(x) : "r"(shared) : "memory");
  return x;
}
JF2_DEVICE float2 lds_f32x2(uint32_t shared) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n"
               : "=f"(x.x), "=f"(x.y)
               : "r"(shared)
               : "memory");
  return x;
}
JF2_DEVICE uint4 lds_128(uint32_t shared) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(shared)
               : "memory");
  return x;
}
JF2_DEVICE uint32_t lds_32(uint32_t shared) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(x) : "r"(shared) : "memory");
  return x;
}
JF2_DEVICE float4 lds_f32x4(uint32_t shared) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(shared)
               : "memory");
  return x;
}
JF2_DEVICE void sts_128(uint32_t shared, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(shared), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}
JF2_DEVICE void sts_f32(uint32_t shared, float x) {
  asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(shared), "f"(x) : "memory");
}
JF2_DEVICE void sts_32(uint32_t shared, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;\n" ::"r"(shared), "r"(x) : "memory");
}
JF2_DEVICE void sts_f32x2(uint32_t shared, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(shared), "f"(x), "f"(y) : "memory");
}

// ---- mma.sync: c += a b, float32 accumulators. With g = lane / 4, t = lane % 4, c holds (row g,
// columns 2t, 2t+1) and (row g + 8, the same columns).
template <typename Element>
JF2_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
JF2_DEVICE void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                     uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
JF2_DEVICE void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
JF2_DEVICE void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same value, about which the compiler knows nothing: what depends on it stays where it is
// written instead of being hoisted out of a loop, where it would hold registers.
JF2_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
template <typename T>
JF2_DEVICE T* opaque(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}

// threadIdx.x, read again at every call instead of being held in a register.
JF2_DEVICE int thread_index() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// ---- arithmetic
// 2^x to about 2 ulp; 2^-inf is 0.
JF2_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x to 1 ulp.
JF2_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
// float32 rounded to the nearest TF32 (10 stored mantissa bits), ties away from zero.
JF2_DEVICE uint32_t cvt_rna_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(y) : "f"(x));
  return y;
}

// ---- global memory
JF2_DEVICE void red_add_f32(float* global, float x) {
  asm volatile("red.global.add.f32 [%0], %1;\n" ::"l"(global), "f"(x) : "memory");
}
#if __CUDA_ARCH__ >= 900
JF2_DEVICE void red_add_f32x4(float* global, float4 x) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(global), "f"(x.x), "f"(x.y),
               "f"(x.z), "f"(x.w)
               : "memory");
}
#endif
// Until the counter is x. In PTX: a loop that the compiler sees may cost a whole kernel its uniform
// registers.
JF2_DEVICE void wait_for(const int* global, int x) {
  asm volatile(
      "{\n.reg .pred same;\n.reg .s32 now;\n"
      "WAIT:\n"
      "ld.acquire.gpu.global.s32 now, [%0];\n"
      "setp.eq.s32 same, now, %1;\n"
      "@same bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}\n" ::"l"(global),
      "r"(x)
      : "memory");
}
JF2_DEVICE void red_release_add(int* global, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;\n" ::"l"(global), "r"(x) : "memory");
}

JF2_DEVICE uint64_t ld_acquire(const uint64_t* global) {
  uint64_t x;
  asm volatile("ld.global.acquire.gpu.u64 %0, [%1];\n" : "=l"(x) : "l"(global) : "memory");
  return x;
}
JF2_DEVICE void st_release(uint64_t* global, uint64_t x) {
  asm volatile("st.global.release.gpu.u64 [%0], %1;\n" ::"l"(global), "l"(x) : "memory");
}

// ---- mbarrier: phases of arrivals
JF2_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals)
               : "memory");
}
JF2_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 t;\nmbarrier.arrive.shared::cta.b64 t, [%0];\n}\n" ::"r"(barrier)
               : "memory");
}
// Arrives when all cp.async that this thread has started so far have landed.
JF2_DEVICE void cp_async_mbarrier_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier) : "memory");
}
// Waits until the phase of parity `parity` has completed.
JF2_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
#define JF2_MBARRIER_ASK "mbarrier.try_wait"  // sleeps a while before it says no
#else
#define JF2_MBARRIER_ASK "mbarrier.test_wait"
#endif
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\n" JF2_MBARRIER_ASK
      ".parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
#undef JF2_MBARRIER_ASK
}

// ---- named barriers: `threads` threads meet
JF2_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace jax_flash2::ptx
