// Where the sm_90a backward sums dQ in a fixed order: the warps that wait for dQ's warpgroup and tell for
// it, so that its products and additions never stand for a round trip to memory. Steps as in backward.cuh.
//
// The key blocks that see a query tile add to it in turn, the last first, and each counts up the tile's
// semaphore when its additions have arrived. Blocks wait only for such as left the queue before them, so
// one never waits.
#pragma once

#include "kernels/sm90/backward_plan.cuh"

namespace jax_flash2::sm90 {

// Both walk over the same steps as dQ's warpgroup. A turn begins when each has arrived at its barrier: one
// since the semaphore has come so far, the other since the step that held the place in the ring before has
// been told of.
template <BackwardTiles kTiles>
struct Turns {
  using Smem = BackwardSmem<kTiles>;

  const BackwardParams& p;
  const Smem smem;

  JF2_DEVICE void await() const {
    walk([&](int* semaphore, const KeyBlock& block, int row, const auto& place)
             __attribute__((always_inline)) {
               ptx::wait_for(semaphore, turn_of<kTiles>(block, row));
               ptx::mbarrier_wait(smem.turn(place.slot()), place.parity() ^ 1);
               arrive(smem.turn(place.slot()));
             });
  }
  JF2_DEVICE void tell() const {
    for (int i = 0; i < Smem::kDsBuffers; ++i) arrive(smem.turn(i));
    walk([&](int* semaphore, const KeyBlock&, int, const auto& place)
             __attribute__((always_inline)) {
               ptx::mbarrier_wait(smem.added(place.slot()), place.parity());
               if (leads()) ptx::red_release_add(semaphore, 1);
               arrive(smem.turn(place.slot()));
             });
  }

 private:
  static JF2_DEVICE bool leads() { return (ptx::thread_index() & 31) == 0; }
  static JF2_DEVICE void arrive(uint32_t barrier) {
    __syncwarp();
    if (leads()) ptx::mbarrier_arrive(barrier);
  }
  // step(semaphore, block, row, place) for each step.
  template <typename Step>
  JF2_DEVICE void walk(const Step& step) const {
    RingPlace<KeyBlock::kSlots> record;
    RingPlace<Smem::kDsBuffers> place;
#pragma unroll 1
    while (true) {
      ptx::mbarrier_wait(smem.k_full(record.slot()), record.parity());
      const KeyBlock& block = smem.blocks[record.slot()];
      if (!block.live) break;
      StepCursor<kTiles> now(block);
#pragma unroll 1
      for (; now.left > 0; now.advance()) {
        step(p.semaphores + now.padded_row(p, block.batch) / kSemaphoreRows, block, now.row, place);
        place.advance();
      }
      ptx::mbarrier_arrive(smem.block_empty(record.slot()));
      record.advance();
    }
  }
};

}  // namespace jax_flash2::sm90
