// The consumers of the sm_90a backward where each warpgroup has 64 keys of its own (Share::kKeys):
// S, P, dP, dS, dK and dV of them. Steps as in backward.cuh.
#pragma once

#include "kernels/sm90/backward_warp.cuh"

namespace jax_flash2::sm90 {

template <BackwardTiles kTiles, typename Math, bool kHasDq>
JF2_DEVICE void consume_keys(const BackwardParams& p, BackwardSmem<kTiles> smem) {
  using Smem = BackwardSmem<kTiles>;
  using Work = KeyWarp<kTiles, Math>;
  Work c{p, smem};
  float dk[Work::kD], dv[Work::kD];
  RingPlace<KeyBlock::kSlots> record;
  RingPlace<kTiles.stages> stage;  // of the step whose S or P is in hand
  RingPlace<Smem::kDsBuffers> ds;

  if (c.group == 1) c.pass_turn();  // the first turn is the first's
#pragma unroll 1
  while (true) {
    ptx::mbarrier_wait(smem.k_full(record.slot()), record.parity());
    const KeyBlock& block = smem.blocks[record.slot()];
    if (!block.live) break;
    StepCursor<kTiles> now(block);  // the step whose S or P is in hand
    const bool has_steps = now.left > 0;
    const int slot = ptx::uniform(record.slot());
    const Range whole = {ptx::uniform(block.whole.begin), ptx::uniform(block.whole.end)};
    bool cut = false;  // does the band cut that step?
    c.zero(dk);
    c.zero(dv);

    auto issue_s = [&]() __attribute__((always_inline)) {
      ptx::mbarrier_wait(smem.step_full(stage.slot()), stage.parity());
      cut = now.row < whole.begin || now.row >= whole.end;
      if (cut) c.clear_padding(block, now.row, stage.slot());
      c.take_turn();
      c.issue_scores(smem.k(slot), smem.q(stage.slot()), smem.lse(stage.slot()));
    };
    auto take_s = [&]() __attribute__((always_inline)) {
      c.pin(c.x);
      c.exponentiate();
      if (cut) c.hide(block, now.row);
      c.pack(c.packed_p);
    };
    // Waits for a buffer for dS, which dQ reads unless it has a kernel of its own; hands it on.
    auto await_ds = [&]() __attribute__((always_inline)) {
      if constexpr (kHasDq) ptx::mbarrier_wait(smem.ds_empty(ds.slot()), ds.parity() ^ 1);
    };
    auto give_ds = [&]() __attribute__((always_inline)) {
      if constexpr (!kHasDq) return;
      ptx::fence_proxy_async();
      c.arrive(smem.ds_full(ds.slot()));
      ds.advance();
    };
    auto release_keys = [&]() __attribute__((always_inline)) {
      c.arrive(smem.v_empty());
      if constexpr (!kHasDq) c.arrive(smem.k_empty());
    };
    // A step of queries that see no key of this warpgroup: its dS is 0.
    auto pass_step = [&]() __attribute__((always_inline)) {
      ptx::mbarrier_wait(smem.step_full(stage.slot()), stage.parity());
      c.clear_padding(block, now.row, stage.slot());
      c.take_turn();
      c.pass_turn();
      await_ds();
      if constexpr (kHasDq) c.store_zeros(smem.ds(ds.slot()));
      give_ds();
      c.take_turn();
      c.pass_turn();
      c.arrive(smem.step_empty(stage.slot()));
      stage.advance();
      now.advance();
    };
    auto store_dv = [&](auto staging) __attribute__((always_inline)) {
      c.store_gradient(block, dv, {p.dv, 1.f, p.shape.value_dim, p.shape.head_dim}, staging);
    };
    auto store_dk = [&](auto staging) __attribute__((always_inline)) {
      c.store_gradient(block, dk, {p.dk, p.scale, p.shape.head_dim, 0}, staging);
    };
    // One step, whose P is packed; S and P of the next along with it unless this is the last.
    // Nothing is in flight before or after. The fence of dS is long where the other warpgroups keep the
    // memory busy: it runs under products, but at the end, when dS is waited for. Where there is dQ, dS
    // is worked out under dV, too; where there is not, that is slower.
    auto step = [&]<bool kLast>() __attribute__((always_inline)) {
      const int here = stage.slot();
      c.take_turn();
      c.issue_scores(smem.v(slot), smem.dout(here), smem.delta(here));
      c.issue_gradient(dv, c.packed_p, smem.dout(here));
      c.pass_turn();
      ptx::wgmma_wait<kHasDq ? 1 : 0>();
      c.pin(c.x);
      if constexpr (!kHasDq) c.pin(dv);
      c.score_gradients();
      if (cut) c.hide(block, now.row);
      c.pack(c.packed_ds);
      if constexpr (kHasDq) {
        ptx::wgmma_wait<0>();
        c.pin(dv);
      }
      if constexpr (kLast) release_keys();
      await_ds();
      if constexpr (kHasDq) c.store(smem.ds(ds.slot()), c.packed_ds);
      if constexpr (kLast) give_ds();
      stage.advance();
      if constexpr (!kLast) {
        now.advance();
        issue_s();
      } else {
        c.take_turn();
      }
      c.issue_gradient(dk, c.packed_ds, smem.q(here));
      c.pass_turn();
      if constexpr (!kLast) {
        give_ds();
        ptx::wgmma_wait<1>();
        take_s();
      } else if constexpr (Smem::kHasStaging) {
        store_dv(smem.staging());  // under the product of dK
      }
      ptx::wgmma_wait<0>();
      c.pin(dk);
      c.arrive(smem.step_empty(here));
    };

    if (has_steps) {
      c.clear_padding(block, record);
      const int hidden = min(c.hidden_tiles(block) * block.heads, now.left - 1);
#pragma unroll 1
      for (int i = 0; i < hidden; ++i) pass_step();
      issue_s();
      c.pass_turn();
      ptx::wgmma_wait<0>();
      take_s();
      ptx::mbarrier_wait(smem.v_full(record.slot()), record.parity());
#pragma unroll 1
      while (now.left > 1) step.template operator()<false>();
      step.template operator()<true>();
    } else {
      release_keys();
    }
    if constexpr (Smem::kHasStaging) {
      if (!has_steps) store_dv(smem.staging());
      store_dk(smem.staging());
    } else {  // the dS buffer that comes next, once it has been read
      if constexpr (kHasDq) ptx::mbarrier_wait(smem.ds_empty(ds.slot()), ds.parity() ^ 1);
      store_dv(smem.ds(ds.slot()));
      store_dk(smem.ds(ds.slot()));
    }
    ptx::mbarrier_arrive(smem.block_empty(record.slot()));
    record.advance();
  }
}

}  // namespace jax_flash2::sm90
