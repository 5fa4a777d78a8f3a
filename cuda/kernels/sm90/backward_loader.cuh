// The loader of the sm_90a backward: the warp that hands out key blocks and loads for the others. Steps as
// in backward.cuh.
#pragma once

#include "device/math.cuh"
#include "kernels/sm90/backward_plan.cuh"

namespace jax_flash2::sm90 {

// Lane 0 does the work. Always as far ahead as stages and tiles allow, into the next key block too.
template <BackwardTiles kTiles>
struct BackwardLoader {
  using Smem = BackwardSmem<kTiles>;

  const BackwardParams& p;
  const Smem smem;
  const CUtensorMap *q_map, *k_map, *v_map, *dout_map;
  RingPlace<KeyBlock::kSlots> record = {};  // of the block in hand
  RingPlace<1> keys = {};                   // its tiles of K and V
  RingPlace<kTiles.stages> stage = {};      // of the step to load next
  int next = 0;                             // block in the queue; lane 0 knows it

  static JF2_DEVICE bool leads() { return (ptx::thread_index() & 31) == 0; }

  JF2_DEVICE void run() {
    take();
#pragma unroll 1
    while (true) {
      open();
      const KeyBlock& block = smem.blocks[record.slot()];
      if (!block.live) return tell_end();
      if (block.steps == 0) take();
      StepCursor<kTiles> step(block);
      // The block before holds K and V to its last steps, whose stages come last, too.
      int early = min(step.left, kTiles.stages - 1);
#pragma unroll 1
      for (; early > 0; --early) load_step(block, step);
      ptx::mbarrier_wait(smem.v_empty(), keys.parity() ^ 1);
      load_keys(block, smem.k(record.slot()), k_map, smem.k_full(record.slot()));
      ptx::mbarrier_wait(smem.k_empty(), keys.parity() ^ 1);
      load_keys(block, smem.v(record.slot()), v_map, smem.v_full(record.slot()));
#pragma unroll 1
      while (step.left > 0) load_step(block, step);
      record.advance();
      keys.advance();
    }
  }

 private:
  // Takes the next block from the queue, so that the round trip is over when it is opened, but no earlier:
  // in a fixed order others may wait for it, and out of order it finds less in L2.
  JF2_DEVICE void take() {
    if (leads()) next = atomicAdd(p.next_block, 1);
  }
  JF2_DEVICE void open() {
    ptx::mbarrier_wait(smem.block_empty(record.slot()), record.parity() ^ 1);
    if (leads()) fill_block<kTiles>(smem.blocks[record.slot()], p, next);
    __syncwarp();  // the record is there for this warp; the others wait for K
  }
  JF2_DEVICE void tell_end() const {
    if (leads()) ptx::mbarrier_arrive(smem.k_full(record.slot()));
  }
  // Unrolled: a loop here costs the warps of head dim 256 their uniform registers.
  template <typename Tile>
  static JF2_DEVICE void load(Tile tile, const CUtensorMap* map, uint32_t full, int head, int row,
                              int batch) {
    load_rows<Tile::kPanels>(tile, map, full, head, row, batch);
  }
  JF2_DEVICE void load_keys(const KeyBlock& block, typename Smem::KV tile, const CUtensorMap* map,
                            uint32_t full) const {
    using KV = typename Smem::KV;
    if (!leads()) return;
    if (block.steps == 0) return ptx::mbarrier_arrive(full);
    ptx::mbarrier_arrive_expect_tx(full, KV::kBytes);
    load(tile, map, full, block.kv_head, block.key_block * kTiles.block_k(), block.batch);
  }
  // Q, dO, LSE and D of the next step, into a stage that is empty.
  JF2_DEVICE void load_step(const KeyBlock& block, StepCursor<kTiles>& step) {
    using Q = typename Smem::Q;
    constexpr int kTermTiles = kTiles.block_q / kTermTile;
    static_assert(kTermTiles * kTermTile == kTiles.block_q, "a step takes whole tiles of terms");
    if (step.left == 1) take();
    ptx::mbarrier_wait(smem.step_empty(stage.slot()), stage.parity() ^ 1);
    if (leads()) {
      const uint32_t full = smem.step_full(stage.slot());
      const uint32_t lse = smem.lse(stage.slot()).base, delta = smem.delta(stage.slot()).base;
      const char* terms =
          p.row_terms + step.padded_row(p, block.batch) / kTermTile * 2 * kTermBytes;
      ptx::mbarrier_arrive_expect_tx(full, 2 * (Q::kBytes + kTermTiles * kTermBytes));
      load(smem.q(stage.slot()), q_map, full, step.head, step.row, block.batch);
      load(smem.dout(stage.slot()), dout_map, full, step.head, step.row, block.batch);
#pragma unroll
      for (int i = 0; i < kTermTiles; ++i, terms += 2 * kTermBytes) {
        ptx::bulk_load(lse + i * Smem::Terms::kPanelBytes, terms, kTermBytes, full);
        ptx::bulk_load(delta + i * Smem::Terms::kPanelBytes, terms + kTermBytes, kTermBytes, full);
      }
    }
    __syncwarp();  // no lane falls behind the barriers' phases
    stage.advance();
    step.advance();
  }
};

}  // namespace jax_flash2::sm90
