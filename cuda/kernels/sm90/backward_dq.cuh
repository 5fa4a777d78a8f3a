// The first warpgroup of the sm_90a backward: it loads for all, and multiplies dQ. Steps as in
// backward.cuh.
#pragma once

#include "device/dq_accum.cuh"
#include "device/math.cuh"
#include "kernels/sm90/backward_plan.cuh"

namespace jax_flash2::sm90 {

// Walks over the steps of a key block: its heads, and of each the query tiles from the last to the
// first.
struct StepCursor {
  int slot = 0, tiles = 0, head = 0, tile = 0, left = 0;

  JF2_DEVICE void start(const KeyBlock* blocks, int at) {
    slot = at, head = 0, tiles = ptx::uniform(blocks[at].live ? blocks[at].tiles : 0);
    tile = tiles - 1, left = tiles * ptx::uniform(blocks[at].heads);
  }
  JF2_DEVICE void advance() {
    --left;
    if (--tile < 0) tile = tiles - 1, ++head;
  }
};

template <BackwardTiles kTiles, typename Math>
struct DqWarp {
  using Smem = BackwardSmem<kTiles>;
  using Element = typename Math::Element;
  using DqMma = ptx::Wgmma<kTiles.dq_cols, Element>;

  const BackwardParams& p;
  const Smem smem;
  const CUtensorMap *q_map, *k_map, *v_map, *dout_map;

  // Read again wherever it is needed: held, it would cost one of few registers.
  static JF2_DEVICE int thread() { return ptx::thread_index(); }

  JF2_DEVICE int padded_len() const { return int(round_up(p.shape.query_len, kTokenTile)); }
  JF2_DEVICE int64_t padded_row(const KeyBlock& block, int head, int tile) const {
    return (int64_t(block.batch) * p.shape.query_heads + block.first_head + head) * padded_len() +
           (block.first_tile + tile) * kTiles.block_q;
  }

  static JF2_DEVICE void load(uint32_t shared, int panel_bytes, int panels, const CUtensorMap* map,
                              uint32_t full, int head, int row, int batch) {
    for (int panel = 0; panel < panels; ++panel)
      ptx::tma_load_4d(shared + panel * panel_bytes, map, full, panel * kPanelCols, head, row,
                       batch);
  }

  // Thread 0: K and V of a block, whose buffers nobody reads any more.
  JF2_DEVICE void load_kv(int slot) const {
    const KeyBlock& block = smem.blocks[slot];
    using KV = typename Smem::KV;
    if (!block.live || block.tiles == 0) {
      ptx::mbarrier_arrive(smem.k_full(slot));
      ptx::mbarrier_arrive(smem.v_full(slot));
      return;
    }
    const int key = block.key_block * kTiles.block_k();
    ptx::mbarrier_arrive_expect_tx(smem.k_full(slot), KV::kBytes);
    load(smem.k().base, KV::kPanelBytes, KV::kPanels, k_map, smem.k_full(slot), block.kv_head, key,
         block.batch);
    ptx::mbarrier_arrive_expect_tx(smem.v_full(slot), KV::kBytes);
    load(smem.v().base, KV::kPanelBytes, KV::kPanels, v_map, smem.v_full(slot), block.kv_head, key,
         block.batch);
  }

  // Thread 0: Q and dO of a step.
  JF2_DEVICE void load_step(const StepCursor& cursor, int stage) const {
    using Q = typename Smem::Q;
    const KeyBlock& block = smem.blocks[cursor.slot];
    const int head = block.first_head + cursor.head;
    const int row = (block.first_tile + cursor.tile) * kTiles.block_q;
    const uint32_t full = smem.step_full(stage);
    ptx::mbarrier_arrive_expect_tx(full, 2 * Q::kBytes);
    load(smem.q(stage).base, Q::kPanelBytes, Q::kPanels, q_map, full, head, row, block.batch);
    load(smem.dout(stage).base, Q::kPanelBytes, Q::kPanels, dout_map, full, head, row, block.batch);
  }
  // A thread's number of a step, one of LSE and D.
  JF2_DEVICE float load_number(const StepCursor& cursor) const {
    static_assert(2 * kTiles.block_q == 128, "a thread carries one number");
    const float* const from = thread() < kTiles.block_q ? p.scaled_lse : p.delta;
    return from[padded_row(smem.blocks[cursor.slot], cursor.head, cursor.tile) +
                thread() % kTiles.block_q];
  }
  // That number into shared memory, negated, as the sum of three terms of 8 significant bits:
  // products with ones add them to S and dP. LSE in units of S; S of a row that sees nothing becomes
  // so small that its P is 0.
  JF2_DEVICE void store_terms(float x, int stage) const {
    const bool is_lse = thread() < kTiles.block_q;
    if (is_lse) x = x == INFINITY ? kHiddenLse : x * p.inverse_scale_log2;
    const typename Smem::Terms terms = is_lse ? smem.lse(stage) : smem.delta(stage);
    float rest = -x;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const __nv_bfloat16 term = __float2bfloat16_rn(rest);
      rest -= __bfloat162float(term);
      ptx::sts_16(terms.address(i, thread() % kTiles.block_q), __bfloat16_as_ushort(term));
    }
    ptx::fence_proxy_async();
    __syncwarp();
    if (thread() % 32 == 0) ptx::mbarrier_arrive(smem.step_full(stage));
  }
  static constexpr float kHiddenLse = 8e37f;

  // Adds dS K of a step to dQ. `wait` comes before the first addition, `release` after the last
  // product.
  template <typename Wait, typename Release>
  JF2_DEVICE void add_step(const KeyBlock& block, const StepCursor& now, int buffer,
                           const Wait& wait, const Release& release) const {
    const int lane = thread() % 32, warp = thread() / 32;
    const int padded_dim = int(round_up(p.shape.head_dim, kHeadDimTile));
    float* const sums = dq_lane(
        p.dq_accum + (padded_row(block, now.head, now.tile) + warp * 16) * padded_dim, lane);
    const uint32_t ds = smem.ds(buffer).outer_major(), k = smem.k().outer_major();
    static_assert(kTiles.block_q == 64, "one product has 64 rows");
#pragma unroll
    for (int col = 0; col < kTiles.head_dim; col += kTiles.dq_cols) {
      float dq[kTiles.dq_cols / 2];
      const uint32_t b = k + Smem::KV::outer_major_column(col);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kTiles.block_k(); i += 16)
        DqMma::template ss<true, true>(dq, ds + Smem::Scores::outer_major_offset(i),
                                       b + Smem::KV::outer_major_offset(i), i > 0);
      ptx::wgmma_commit();
      if (col == 0) wait();
      ptx::wgmma_wait<0>();
#pragma unroll
      for (float& x : dq) ptx::pin(x);
      if (col + kTiles.dq_cols >= kTiles.head_dim) release();
#pragma unroll
      for (int j = 0; j < kTiles.dq_cols / 8; ++j) {
        // H may be far less than the tile's head dim where Hv is not.
        if ((col + j * 8) / kHeadDimTile * kHeadDimTile >= padded_dim) break;
        const float (&c)[4] = *reinterpret_cast<const float (*)[4]>(&dq[j * 4]);
        add_dq(sums + (col / 8 + j) * kDqPiece, c);
      }
    }
  }
};

template <BackwardTiles kTiles, typename Math>
JF2_DEVICE void load_and_multiply_dq(const BackwardParams& p, BackwardSmem<kTiles> smem,
                                     const CUtensorMap* q_map, const CUtensorMap* k_map,
                                     const CUtensorMap* v_map, const CUtensorMap* dout_map) {
  using Smem = BackwardSmem<kTiles>;
  const DqWarp<kTiles, Math> warp{p, smem, q_map, k_map, v_map, dout_map};
  RingPlace<KeyBlock::kSlots> record;  // of the block to open next
  RingPlace<kTiles.stages> stage;      // of the step to load next
  RingPlace<Smem::kDsBuffers> ds;      // of the step whose dQ comes next
  int index = blockIdx.x;              // in the queue, of the block to open next
  int slot = 0;                        // of the block in hand
  int waiting = 0;                     // steps loaded, less those whose dQ is done
  StepCursor next;                     // the step to load next
  float number = 0.f;                  // of that step

  auto find_number = [&]() __attribute__((always_inline)) {
    if (next.left > 0) number = warp.load_number(next);
  };
  // Takes the next block from the queue. Its index was asked for when the one before was taken.
  auto open = [&]() __attribute__((always_inline)) {
    ptx::mbarrier_wait(smem.block_empty(record.slot), record.parity ^ 1);
    ptx::barrier_sync(kFirstWarpgroup, 128);  // nobody reads the record that was there
    if (warp.thread() == 0) {
      fill_block<kTiles>(smem.blocks[record.slot], p, index);
      if (index < p.order.blocks()) index = atomicAdd(p.next_block, 1) + gridDim.x;
    }
    ptx::barrier_sync(kFirstWarpgroup, 128);  // the record is there
    next.start(smem.blocks, record.slot);
    find_number();
    record.advance();
  };

  open();
  if (warp.thread() == 0) warp.load_kv(0);
#pragma unroll 1
  while (smem.blocks[slot].live) {
    const KeyBlock& block = smem.blocks[slot];
    bool opened = false;  // the next block
    StepCursor now;
    now.start(smem.blocks, slot);
#pragma unroll 1
    for (; now.left > 0; now.advance()) {
      // As many steps ahead as there are stages, into the next block too.
#pragma unroll 1
      while (waiting < kTiles.stages) {
        if (next.left == 0) {
          if (opened) break;
          open();
          opened = true;
          if (next.left == 0) break;
        }
        ptx::mbarrier_wait(smem.step_empty(stage.slot), stage.parity ^ 1);
        if (warp.thread() == 0) warp.load_step(next, stage.slot);
        warp.store_terms(number, stage.slot);
        stage.advance();
        next.advance();
        find_number();
        ++waiting;
      }
      ptx::mbarrier_wait(smem.ds_full(ds.slot), ds.parity);
      auto release = [&]() __attribute__((always_inline)) {
        if (warp.thread() % 32 == 0) ptx::mbarrier_arrive(smem.ds_empty(ds.slot));
      };
      int* turn = nullptr;
      if (p.semaphores != nullptr)
        turn = p.semaphores + warp.padded_row(block, now.head, now.tile) / kSemaphoreRows;
      auto wait_turn = [&]() __attribute__((always_inline)) {
        if (turn == nullptr) return;
        // The key blocks before this one that see the rows.
        const int row = (block.first_tile + now.tile) * kTiles.block_q;
        const Range keys = block.band.keys_of({row, row + kTiles.block_q});
        const int before = block.key_block - keys.begin / kTiles.block_k();
        if (warp.thread() == 0) {
          while (ptx::ld_acquire(turn) != before) {
          }
        }
        ptx::barrier_sync(kFirstWarpgroup, 128);  // the sums of the blocks before are visible
      };
      warp.add_step(block, now, ds.slot, wait_turn, release);
      if (turn != nullptr) {
        ptx::barrier_sync(kFirstWarpgroup, 128);  // every thread has added
        if (warp.thread() == 0) {
          __threadfence();
          ptx::red_release_add(turn, 1);
        }
      }
      ds.advance();
      --waiting;
    }
    if (!opened) open();
    slot ^= 1;
    // K and V are free: consumers multiplied their last dS with them, and this warpgroup its dQ.
    if (warp.thread() == 0) warp.load_kv(slot);
  }
}

}  // namespace jax_flash2::sm90
