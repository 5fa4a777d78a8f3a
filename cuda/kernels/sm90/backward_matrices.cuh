// The consumers of the sm_90a backward where the two warpgroups share 64 keys (Share::kMatrices): one
// has S, P and dV, the other dP, dS and dK, and P goes from one to the other through shared memory.
// Steps as in backward.cuh.
#pragma once

#include "kernels/sm90/backward_warp.cuh"

namespace jax_flash2::sm90 {

template <BackwardTiles kTiles, typename Math, bool kHasP>
JF2_DEVICE void consume_matrices(const BackwardParams& p, BackwardSmem<kTiles> smem) {
  using Smem = BackwardSmem<kTiles>;
  using Work = KeyWarp<kTiles, Math>;
  Work c{p, smem};
  float d[Work::kD];  // dV or dK
  RingPlace<KeyBlock::kSlots> record;
  RingPlace<kTiles.stages> stage;  // of the step whose S or dP is in hand
  RingPlace<1> shared_p;

#pragma unroll 1
  while (true) {
    ptx::mbarrier_wait(smem.k_full(record.slot()), record.parity());
    const KeyBlock& block = smem.blocks[record.slot()];
    if (!block.live) break;
    StepCursor<kTiles> now(block);  // the step whose S or dP is in hand
    const int slot = ptx::uniform(record.slot());
    const Range whole = {ptx::uniform(block.whole.begin), ptx::uniform(block.whole.end)};
    bool cut = false;  // does the band cut that step?
    c.zero(d);

    // S or dP of that step.
    auto issue = [&]() __attribute__((always_inline)) {
      ptx::mbarrier_wait(smem.step_full(stage.slot()), stage.parity());
      cut = now.row < whole.begin || now.row >= whole.end;
      if (cut) c.clear_padding(block, now.row, stage.slot());
      if constexpr (kHasP) {
        c.issue_scores(smem.k(slot), smem.q(stage.slot()), smem.lse(stage.slot()));
      } else {
        c.issue_scores(smem.v(slot), smem.dout(stage.slot()), smem.delta(stage.slot()));
      }
    };
    // It has arrived: P or dS, in float32.
    auto take = [&]() __attribute__((always_inline)) {
      c.pin(c.x);
      if constexpr (kHasP) {
        c.exponentiate();
      } else {
        ptx::mbarrier_wait(smem.p_full(), shared_p.parity());
        c.load(smem.p(), c.packed_p);
        c.arrive(smem.p_empty());
        shared_p.advance();
        c.score_gradients();
      }
      if (cut) c.hide(block, now.row);
    };
    // Packs it and, P, hands it on.
    auto give = [&]() __attribute__((always_inline)) {
      if constexpr (kHasP) {
        c.pack(c.packed_p);
        ptx::mbarrier_wait(smem.p_empty(), shared_p.parity() ^ 1);
        c.store(smem.p(), c.packed_p);
        c.arrive(smem.p_full());
        shared_p.advance();
      } else {
        c.pack(c.packed_ds);
      }
    };
    auto issue_gradient = [&](int of) __attribute__((always_inline)) {
      if constexpr (kHasP) {
        c.issue_gradient(d, c.packed_p, smem.dout(of));
      } else {
        c.issue_gradient(d, c.packed_ds, smem.q(of));
      }
    };
    auto end_step = [&](int of) __attribute__((always_inline)) {
      ptx::wgmma_wait<0>();
      c.pin(d);
      c.arrive(smem.step_empty(of));
    };

    auto release_keys = [&]() __attribute__((always_inline)) {
      c.arrive(kHasP ? smem.k_empty() : smem.v_empty());
    };

    if (now.left > 0) {
      c.clear_padding(block, record);
      if constexpr (!kHasP) ptx::mbarrier_wait(smem.v_full(record.slot()), record.parity());
      issue();
      ptx::wgmma_wait<0>();
      take();
      give();
#pragma unroll 1
      while (now.left > 1) {
        const int before = stage.slot();
        stage.advance();
        now.advance();
        issue_gradient(before);
        issue();
        end_step(before);
        take();
        give();
      }
      release_keys();
      issue_gradient(stage.slot());
      end_step(stage.slot());
      stage.advance();
    } else {
      release_keys();
    }
    if constexpr (kHasP) {  // out through the tile of P, once it has been read
      ptx::mbarrier_wait(smem.p_empty(), shared_p.parity() ^ 1);
      c.store_gradient(block, d, {p.dv, 1.f, p.shape.value_dim, p.shape.head_dim}, smem.p());
    } else {
      c.store_gradient(block, d, {p.dk, p.scale, p.shape.head_dim, 0}, smem.staging());
    }
    ptx::mbarrier_arrive(smem.block_empty(record.slot()));
    record.advance();
  }
}

}  // namespace jax_flash2::sm90
