// In place of cuda/device/ptx_sm90.cuh: the copy engine, warpgroups and stmatrix on the emulated machine.
#pragma once

#include <cuda.h>

#include "device/ptx_sm80.cuh"
#include "device/ptx_wgmma.cuh"

namespace jax_flash2::ptx {

// ---- mbarrier, for the copy engine
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect_tx(uint32_t address, int bytes) {
  mbarrier(address).bytes += bytes;
  mbarrier_arrive(address);
}

// ---- Loads: `copy` lands some time from now, then the barrier hears of `bytes`.
template <typename Copy>
void start_load(uint32_t barrier, int bytes, const Copy& copy) {
  using emulated::machine;
  const auto land = [=, block = machine.block] {
    const bool early = machine.fault == emulated::Fault::kEarlySignal && machine.chance(4);
    if (!early) copy();
    mbarrier(barrier).bytes -= bytes;
    advance(mbarrier(barrier));
    if (early) block->loads.push_back({machine.copy_delay, copy});
  };
  machine.block->loads.push_back({machine.draw_delay(machine.copy_delay), land});
}
inline void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  if (shared % 16 != 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    emulated::fail("a bulk copy is of whole 16 bytes");
  start_load(barrier, bytes, [=] { std::memcpy(at(shared, bytes), global, bytes); });
}

// ---- Boxes of tensors, [rows of the box][its heads][64 columns] in the 128-byte swizzle in shared memory
struct Box {
  CUtensorMap map;
  uint32_t shared;
  int64_t x[4];

  int rows() const { return int(map.box[2] * map.box[1]); }  // of 128 bytes
  int bytes() const { return rows() * 128; }
  // Where an element lies in global memory; null past an end.
  char* global(int row, int col) const {
    const int64_t heads = map.box[1];
    const int64_t place[4] = {x[0] + col, x[1] + row % heads, x[2] + row / heads, x[3]};
    char* p = map.data;
    for (int i = 0; i < 4; ++i) {
      if (place[i] < 0 || place[i] >= map.sizes[i]) return nullptr;
      p += place[i] * map.strides[i];
    }
    return p;
  }
  // f(row, col, shared address) for each element.
  template <typename F>
  void for_each(const F& f) const {
    for (int row = 0; row < rows(); ++row)
      for (int col = 0; col < 64; ++col) f(row, col, swizzled(shared + row * 128 + col * 2));
  }
};
inline Box make_box(uint32_t shared, const CUtensorMap* map, int x0, int x1, int x2, int x3) {
  if (shared % 128 != 0) emulated::fail("a box at shared address %u is not aligned", shared);
  if (map->box[3] != 1) emulated::fail("a box is of one sequence");
  return {*map, shared, {x0, x1, x2, x3}};
}
inline void prefetch_tensor_map(const CUtensorMap*) {}
inline void tma_load_4d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int x0, int x1,
                        int x2, int x3) {
  const Box box = make_box(shared, map, x0, x1, x2, x3);
  start_load(barrier, box.bytes(), [=] {
    const bool dirty = emulated::machine.fault == emulated::Fault::kDirtyPadding;
    box.for_each([&](int row, int col, uint32_t address) {
      uint16_t x = dirty ? 0x7fff : 0;
      if (const char* const from = box.global(row, col)) std::memcpy(&x, from, 2);
      store(address, x);
    });
  });
}
inline void tma_store_4d(const CUtensorMap* map, uint32_t shared, int x0, int x1, int x2, int x3) {
  emulated::Block& block = *emulated::machine.block;
  const int thread = int(threadIdx.x);
  const Box box = make_box(shared, map, x0, x1, x2, x3);
  const auto read = [=](std::vector<uint8_t>& bytes) {
    bytes.resize(box.bytes());
    box.for_each([&](int row, int col, uint32_t address) {
      std::memcpy(&bytes[row * 128 + col * 2], at(address, 2), 2);
    });
  };
  const auto write = [=](const std::vector<uint8_t>& bytes) {
    box.for_each([&](int row, int col, uint32_t) {
      if (char* const to = box.global(row, col)) std::memcpy(to, &bytes[row * 128 + col * 2], 2);
    });
  };
  const int delay = emulated::machine.draw_delay(emulated::machine.copy_delay);
  block.stores.push_back(
      {thread, block.store_groups[thread], delay, read, write, {}, false, false});
}
inline void bulk_commit() { ++emulated::machine.block->store_groups[int(threadIdx.x)]; }
// Waits until the groups of this thread but for the newest kPending have come so far.
template <int kPending>
void await_stores(bool emulated::Store::* so_far) {
  emulated::Block& block = *emulated::machine.block;
  const int thread = int(threadIdx.x), newest = block.store_groups[thread] - kPending;
  emulated::wait_until([&, thread, newest] {
    return std::all_of(block.stores.begin(), block.stores.end(), [&](const emulated::Store& s) {
      return s.thread != thread || s.group >= newest || s.*so_far;
    });
  });
}
template <int kPending>
void bulk_wait_read() {
  await_stores<kPending>(&emulated::Store::was_read);
}
template <int kPending>
void bulk_wait() {
  await_stores<kPending>(&emulated::Store::was_written);
}
inline void fence_proxy_async() {}

// ---- Warpgroups
template <int>
void setmaxnreg_inc() {}
template <int>
void setmaxnreg_dec() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {
  int none = 0;
  emulated::together("wgmma.commit", none, [](int**) {
    emulated::Warp& warp = emulated::machine.warp();
    ++warp.product_group;
    warp.pace = 1 + emulated::machine.draw_delay(emulated::machine.product_delay);
  });
}
template <int kPending>
void wgmma_wait() {
  const emulated::Warp& warp = emulated::machine.warp();
  const int newest = warp.product_group - kPending;
  emulated::wait_until(
      [&] { return warp.products.empty() || warp.products.front().group >= newest; });
  emulated::dawdle(4);  // some lanes go ahead of others
}
inline void pin(float&) {}
inline int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// ---- Named barriers
inline void barrier_arrive(int id, int threads) {
  emulated::arrive(emulated::machine.block->barriers[id], threads);
}

// ---- stmatrix
inline void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  struct Lane {
    uint32_t r[4], address;
  } mine = {{r0, r1, r2, r3}, address};
  emulated::together("stmatrix", mine, [](Lane** lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        store(lanes[i * 8 + lane / 4]->address + lane % 4 * 4, lanes[lane]->r[i]);
  });
}

}  // namespace jax_flash2::ptx
