// The first warpgroup of the sm_90a backward: it loads for all, and multiplies dQ, unless that has a
// kernel of its own. Steps as in backward.cuh.
#pragma once

#include "device/dq_accum.cuh"
#include "device/math.cuh"
#include "kernels/sm90/backward_plan.cuh"

namespace jax_flash2::sm90 {

// Walks over the steps of a key block: its query tiles from the first to the last, and of each its
// heads, so that blocks of one group that run at a time are on the same queries.
struct StepCursor {
  int slot = 0, heads = 0, head = 0, tile = 0, left = 0;

  JF2_DEVICE void start(const KeyBlock* blocks, int at) {
    slot = at, head = 0, tile = 0, heads = ptx::uniform(blocks[at].heads);
    left = heads * ptx::uniform(blocks[at].live ? blocks[at].tiles : 0);
  }
  JF2_DEVICE void advance() {
    --left;
    if (++head == heads) head = 0, ++tile;
  }
};

template <BackwardTiles kTiles>
JF2_DEVICE int64_t padded_row(const BackwardParams& p, const KeyBlock& block,
                              const StepCursor& step) {
  const int64_t head = int64_t(block.batch) * p.shape.query_heads + block.first_head + step.head;
  // Opaque: what can be had again from constants shall hold no registers from step to step.
  return head * int(round_up(ptx::opaque(p.shape.query_len), kTokenTile)) +
         (block.first_tile + step.tile) * kTiles.block_q;
}

// What the first warp loads for all: key blocks, and steps as far ahead as there are stages, into the
// next block too. Lane 0 does the work.
template <BackwardTiles kTiles>
struct BackwardLoader {
  using Smem = BackwardSmem<kTiles>;

  const BackwardParams& p;
  const Smem smem;
  const CUtensorMap *q_map, *k_map, *v_map, *dout_map;
  RingPlace<KeyBlock::kSlots> record = {};  // of the block to open next
  RingPlace<kTiles.stages> stage = {};      // of the step to load next
  StepCursor next = {};                     // the step to load next
  int waiting = 0;                          // steps loaded, less those whose dQ is done

  static JF2_DEVICE bool leads() { return (ptx::thread_index() & 31) == 0; }

  // Opens the block with this index in the queue, and asks for the one after it, early, so that the
  // round trip is over when that is opened.
  JF2_DEVICE void open(int index) {
    ptx::mbarrier_wait(smem.block_empty(record.slot()), record.parity() ^ 1);
    if (leads()) {
      KeyBlock& block = smem.blocks[record.slot()];
      fill_block<kTiles>(block, p, index);
      block.next = block.live ? atomicAdd(p.next_block, 1) + int(gridDim.x) : index;
    }
    __syncwarp();  // the record is there for this warp; the others wait for K
    next.start(smem.blocks, record.slot());
    record.advance();
  }
  // Unrolled, unlike load_rows: a loop here costs the first warpgroup its uniform registers.
  static JF2_DEVICE void load(uint32_t shared, int panel_bytes, int panels, const CUtensorMap* map,
                              uint32_t full, int head, int row, int batch) {
    for (int panel = 0; panel < panels; ++panel)
      ptx::tma_load_4d(shared + panel * panel_bytes, map, full, panel * kPanelCols, head, row,
                       batch);
  }
  // K or V of the block that was opened last, to a tile that nobody reads any more.
  JF2_DEVICE void load_keys(typename Smem::KV tile, const CUtensorMap* map, uint32_t full) const {
    using KV = typename Smem::KV;
    if (!leads()) return;
    const KeyBlock& block = smem.blocks[opened()];
    if (!block.live || block.tiles == 0) return ptx::mbarrier_arrive(full);
    ptx::mbarrier_arrive_expect_tx(full, KV::kBytes);
    load(tile.base, KV::kPanelBytes, KV::kPanels, map, full, block.kv_head,
         block.key_block * kTiles.block_k(), block.batch);
  }
  JF2_DEVICE int opened() const { return record.slot() ^ 1; }
  JF2_DEVICE void load_k() const { load_keys(smem.k(opened()), k_map, smem.k_full(opened())); }
  JF2_DEVICE void load_v() const { load_keys(smem.v(opened()), v_map, smem.v_full(opened())); }
  // Q, dO, LSE and D of the next step, into a stage that is empty.
  JF2_DEVICE void load_step() {
    using Q = typename Smem::Q;
    constexpr int kTermTiles = kTiles.block_q / kTermTile;
    static_assert(kTermTiles * kTermTile == kTiles.block_q, "a step takes whole tiles of terms");
    ptx::mbarrier_wait(smem.step_empty(stage.slot()), stage.parity() ^ 1);
    if (leads()) {
      const KeyBlock& block = smem.blocks[next.slot];
      const int head = block.first_head + next.head;
      const int row = (block.first_tile + next.tile) * kTiles.block_q;
      const uint32_t full = smem.step_full(stage.slot());
      const uint32_t q = smem.q(stage.slot()).base, dout = smem.dout(stage.slot()).base;
      const uint32_t lse = smem.lse(stage.slot()).base, delta = smem.delta(stage.slot()).base;
      const char* terms =
          p.row_terms + padded_row<kTiles>(p, block, next) / kTermTile * 2 * kTermBytes;
      ptx::mbarrier_arrive_expect_tx(full, 2 * (Q::kBytes + kTermTiles * kTermBytes));
      load(q, Q::kPanelBytes, Q::kPanels, q_map, full, head, row, block.batch);
      load(dout, Q::kPanelBytes, Q::kPanels, dout_map, full, head, row, block.batch);
#pragma unroll
      for (int i = 0; i < kTermTiles; ++i, terms += 2 * kTermBytes) {
        ptx::bulk_load(lse + i * Smem::Terms::kPanelBytes, terms, kTermBytes, full);
        ptx::bulk_load(delta + i * Smem::Terms::kPanelBytes, terms + kTermBytes, kTermBytes, full);
      }
    }
    stage.advance();
    next.advance();
    ++waiting;
  }
  // Is the block that follows the one in `slot` open?
  JF2_DEVICE bool is_open_after(int slot) const { return next.slot != slot; }
  JF2_DEVICE void open_after(int slot) {
    if (!is_open_after(slot)) open(smem.blocks[slot].next);
  }
  // While the block in `slot` is in hand: fills the stages.
  JF2_DEVICE void load_ahead(int slot) {
#pragma unroll 1
    while (waiting < kTiles.stages) {
      if (next.left > 0) {
        load_step();
      } else if (!is_open_after(slot)) {
        open_after(slot);
      } else {
        break;
      }
    }
  }
};

template <BackwardTiles kTiles, typename Math>
struct DqWarp {
  using Smem = BackwardSmem<kTiles>;
  using DqMma = ptx::Wgmma<kTiles.dq_cols, typename Math::Element>;

  const BackwardParams& p;
  const Smem smem;

  // Adds dS K of a step to dQ. `release` follows the last product.
  template <typename Release>
  JF2_DEVICE void add_step(const KeyBlock& block, const StepCursor& now, int buffer,
                           const Release& release) const {
    const int thread = ptx::thread_index(), warp = thread / 32;
    const int padded_dim = int(round_up(ptx::opaque(p.shape.head_dim), kHeadDimTile));
    float* const sums = dq_lane(
        p.dq_accum + (padded_row<kTiles>(p, block, now) + warp * 16) * padded_dim, thread % 32);
    const uint32_t ds = ptx::opaque(smem.ds(buffer).outer_major());
    const uint32_t k = ptx::opaque(smem.k(now.slot).outer_major());
    constexpr int kParts = kTiles.block_q / 64 * (kTiles.head_dim / kTiles.dq_cols);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int row = part % (kTiles.block_q / 64) * 64;
      const int col = part / (kTiles.block_q / 64) * kTiles.dq_cols;
      float dq[kTiles.dq_cols / 2];
      const uint32_t a = ds + Smem::Scores::outer_major_column(row);
      const uint32_t b = k + Smem::KV::outer_major_column(col);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kTiles.block_k(); i += 16)
        DqMma::template ss<true, true>(dq, a + Smem::Scores::outer_major_offset(i),
                                       b + Smem::KV::outer_major_offset(i), i > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
#pragma unroll
      for (float& x : dq) ptx::pin(x);
      if (part + 1 == kParts) release();
      float* const to = sums + row * padded_dim;
#pragma unroll
      for (int j = 0; j < kTiles.dq_cols / 8; ++j) {
        // H may be far less than the tile's head dim where Hv is not.
        if ((col + j * 8) / kHeadDimTile * kHeadDimTile >= padded_dim) break;
        const float (&c)[4] = *reinterpret_cast<const float (*)[4]>(&dq[j * 4]);
        add_dq(to + (col / 8 + j) * kDqPiece, c);
      }
    }
  }
};

template <BackwardTiles kTiles, typename Math, bool kHasDq>
JF2_DEVICE void load_and_multiply_dq(const BackwardParams& p, BackwardSmem<kTiles> smem,
                                     const CUtensorMap* q_map, const CUtensorMap* k_map,
                                     const CUtensorMap* v_map, const CUtensorMap* dout_map) {
  using Smem = BackwardSmem<kTiles>;
  const DqWarp<kTiles, Math> work{p, smem};
  BackwardLoader<kTiles> loader{p, smem, q_map, k_map, v_map, dout_map};
  const bool loads = ptx::uniform(ptx::thread_index() / 32) == 0;
  if (!kHasDq && !loads) return;
  RingPlace<KeyBlock::kSlots> record;  // of the block in hand
  RingPlace<Smem::kDsBuffers> ds;      // of the step whose dQ comes next
  auto arrive = [](uint32_t barrier) __attribute__((always_inline)) {
    if (BackwardLoader<kTiles>::leads()) ptx::mbarrier_arrive(barrier);
  };

  auto next_k = [&]() __attribute__((always_inline)) {
    loader.open_after(record.slot());
    loader.load_k();
  };

  if (loads) {
    loader.open(blockIdx.x);
    loader.load_k();
    loader.load_v();
  }
#pragma unroll 1
  while (true) {
    ptx::mbarrier_wait(smem.k_full(record.slot()), record.parity());
    const KeyBlock& block = smem.blocks[record.slot()];
    if (!block.live) break;
    StepCursor now;
    now.start(smem.blocks, record.slot());
    const bool has_steps = now.left > 0;
#pragma unroll 1
    for (; now.left > 0; now.advance()) {
      if (loads) loader.load_ahead(record.slot());
      ptx::mbarrier_wait(smem.ds_full(ds.slot()), ds.parity());
      if (loads && now.left == 1) next_k();  // consumers multiplied with V for the last time
      auto release = [&]() __attribute__((always_inline)) { arrive(smem.ds_empty(ds.slot())); };
      if constexpr (kHasDq) {
        work.add_step(block, now, ds.slot(), release);
      } else {
        release();
      }
      ds.advance();
      --loader.waiting;
    }
    // K is free too: this warpgroup multiplied its last dQ with it.
    if constexpr (kHasDq) ptx::barrier_sync(kFirstWarpgroup, 128);
    arrive(smem.block_empty(record.slot()));
    if (loads) {
      if (!has_steps) next_k();
      loader.load_v();
    }
    record.advance();
  }
}

}  // namespace jax_flash2::sm90
