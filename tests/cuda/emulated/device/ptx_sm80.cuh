// In place of cuda/device/ptx_sm80.cuh: its instructions on the emulated machine, as far as the kernels
// of cuda/kernels/sm90 and cuda/kernels/any run them. What device/math.cuh, gemm.cuh and copy.cuh name
// beyond those is only declared.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "machine.h"

#define JF2_DEVICE inline

namespace jax_flash2::ptx {

// ---- Shared memory
inline uint32_t shared_address(const void* p) {
  const auto* const byte = static_cast<const uint8_t*>(p);
  if (byte >= sm90::shared && byte < sm90::shared + sizeof(sm90::shared))
    return uint32_t(byte - sm90::shared) + emulated::kDynamicAddress;
  const uint8_t*& memory = emulated::machine.static_memory;
  if (memory == nullptr) memory = byte;
  return uint32_t(byte - memory) + emulated::kStaticAddress;
}
inline uint8_t* at(uint32_t address, int bytes) {
  using emulated::machine;
  const int64_t offset = int64_t{address} - emulated::kDynamicAddress;
  if (offset >= 0 && offset + bytes <= machine.shared_bytes) return sm90::shared + offset;
  const int64_t beyond = int64_t{address} - emulated::kStaticAddress;
  if (machine.static_memory == nullptr || beyond < 0 || beyond + bytes > emulated::kStaticBytes)
    emulated::fail("%d bytes at shared address %u are not the block's", bytes, address);
  return const_cast<uint8_t*>(machine.static_memory) + beyond;
}
template <typename T>
inline T load(uint32_t address) {
  if (address % sizeof(T) != 0) emulated::fail("shared address %u is not aligned", address);
  T x;
  std::memcpy(&x, at(address, sizeof(T)), sizeof(T));
  return x;
}
template <typename T>
inline void store(uint32_t address, T x) {
  if (address % sizeof(T) != 0) emulated::fail("shared address %u is not aligned", address);
  std::memcpy(at(address, sizeof(T)), &x, sizeof(T));
}
inline float lds_f32(uint32_t address) { return load<float>(address); }
inline float2 lds_f32x2(uint32_t address) { return load<float2>(address); }
inline uint4 lds_128(uint32_t address) { return load<uint4>(address); }
inline void sts_128(uint32_t address, uint4 x) { store(address, x); }
inline void sts_f32(uint32_t address, float x) { store(address, x); }
inline void sts_32(uint32_t address, uint32_t x) { store(address, x); }
inline void sts_f32x2(uint32_t address, float x, float y) { store(address, float2{x, y}); }

// Lane l gives the address of row l % 8 of matrix l / 8, and gets two elements of row l / 4 of each.
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  struct Lane {
    uint32_t* r;
    uint32_t address;
  } mine = {r, address};
  emulated::together("ldmatrix", mine, [](Lane** lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        lanes[lane]->r[i] = load<uint32_t>(lanes[i * 8 + lane / 4]->address + lane % 4 * 4);
  });
}

// ---- Global memory
inline void red_add_f32(float* global, float x) { *global += x; }
inline void red_add_f32x4(float* global, float4 x) {
  const float terms[4] = {x.x, x.y, x.z, x.w};
  for (int i = 0; i < 4; ++i) global[i] += terms[i];
}
inline void wait_for(const int* global, int x) {
  emulated::wait_until([&] { return *global == x; });
}
inline void red_release_add(int* global, int x) { *global += x; }

// ---- Registers and arithmetic
template <typename T>
inline T opaque(T x) {
  return x;
}
inline int thread_index() { return int(threadIdx.x); }
inline float ex2(float x) { return std::exp2(x); }
inline float rcp(float x) { return 1.f / x; }

// ---- mbarrier
inline emulated::Mbarrier& mbarrier(uint32_t address) {
  auto& all = emulated::machine.block->mbarriers;
  const auto found = all.find(address);
  if (found == all.end()) emulated::fail("there is no mbarrier at shared address %u", address);
  return found->second;
}
// After an arrival, or bytes: does the phase end?
inline void advance(emulated::Mbarrier& barrier) {
  if (barrier.pending < 0) emulated::fail("too many arrivals at an mbarrier");
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.expected;
  ++barrier.phase;
}
inline void mbarrier_init(uint32_t address, int arrivals) {
  emulated::machine.block->mbarriers[address] = {arrivals, arrivals, 0, 0};
}
inline void mbarrier_arrive(uint32_t address) {
  emulated::Machine& machine = emulated::machine;
  emulated::Mbarrier& barrier = mbarrier(address);
  if (machine.fault == emulated::Fault::kLostArrival && ++machine.arrivals == 40) return;
  --barrier.pending;
  advance(barrier);
}
// Lanes that wait for the same phase see it end in the same round, as on the hardware: PTX promises less, but
// loops of waits rely on it, where a lane that fell a whole ring behind its warp would wait forever.
inline void mbarrier_wait(uint32_t address, uint32_t parity) {
  const emulated::Mbarrier& barrier = mbarrier(address);
  emulated::wait_until([&] { return (barrier.phase & 1) != (parity & 1); });
}

// ---- Named barriers
inline void barrier_sync(int id, int threads) {
  emulated::sync(emulated::machine.block->barriers[id], threads);
}

// ---- Not run
void cp_async_16(uint32_t shared, const void* global, int valid_bytes);
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared);
template <typename Element>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
uint32_t cvt_rna_tf32(float x);

}  // namespace jax_flash2::ptx
