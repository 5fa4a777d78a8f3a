// The consumers of the sm_90a forward: the order of products, waits and hand-overs. Steps as in
// forward.cuh.
#pragma once

#include "kernels/sm90/forward_warp.cuh"

namespace jax_flash2::sm90 {

// A stale maximum is kept until the true one exceeds it by this much (log2): P stays below 2^8, far
// from float16's largest number, and most blocks need no rescaling of O.
inline constexpr float kRescaleLog2 = 8.f;

template <ForwardTiles kTiles, typename Math>
JF2_DEVICE void consume(const ForwardParams& p, ForwardSmem<kTiles> smem,
                        const CUtensorMap* out_map) {
  using Work = Consumer<kTiles, Math>;
  constexpr int kBlockK = kTiles.block_k, kS = Work::kS, kSlots = ForwardTile::kSlots;
  const int lane = threadIdx.x & 31, warpgroup = ptx::uniform(threadIdx.x / 128) - 1;
  Work c{p, smem, out_map, warpgroup, int(threadIdx.x / 32 % 4), lane};
  using QRing = Ring<kTiles.q_buffers>;
  using KVRing = Ring<kTiles.stages>;
  uint32_t count = 0;  // tiles taken
  uint32_t steps = 0;  // K tiles used; V's follow one behind
  int started = 0;     // O holds a part of the tile's sum

  auto release = [&](uint32_t empty) __attribute__((always_inline)) {
    if (lane == 0) ptx::mbarrier_arrive(empty);
  };
  auto tile = [&]() __attribute__((always_inline)) -> ForwardTile& {
    return smem.tiles[(count - 1) % kSlots];
  };
  auto visit = [&]() __attribute__((always_inline)) -> const Visit& {
    return tile().visits[warpgroup];
  };
  // Takes the next tile; false at the end of the round.
  auto next_tile = [&]() __attribute__((always_inline)) {
    ptx::mbarrier_wait(smem.q_full(QRing::slot(count)), QRing::parity(count));
    ++count;
    return tile().blocks > 0;
  };
  auto take_turn = [&]() __attribute__((always_inline)) {
    if constexpr (kTiles.turn != Turn::kNone) ptx::barrier_sync(kTurn + warpgroup, 256);
  };
  // Hands the turn on, if `turn` is what a turn ends with.
  auto pass_turn = [&](Turn turn) __attribute__((always_inline)) {
    if (kTiles.turn == turn && turn != Turn::kNone)
      ptx::barrier_arrive(kTurn + (warpgroup + 1) % kTiles.consumers, 256);
  };
  // The buffer of the tile in hand, and its release.
  auto q_slot = [&]() __attribute__((always_inline)) { return QRing::slot(count - 1); };
  auto release_q = [&]() __attribute__((always_inline)) {
    // Every lane for itself: with the buffer goes the record of an older tile, which each has read.
    ptx::mbarrier_arrive(smem.q_empty(q_slot()));
  };
  // One buffer is wanted back as soon as the last scores are there.
  auto release_q_early = [&](int j) __attribute__((always_inline)) {
    if (kTiles.q_buffers == 1 && j == 0) release_q();
  };
  auto await_k = [&]() __attribute__((always_inline)) {
    ptx::mbarrier_wait(smem.k_full(KVRing::slot(steps)), KVRing::parity(steps));
  };
  auto await_v = [&](uint32_t step) __attribute__((always_inline)) {
    // With a joint stage it came with K.
    if constexpr (!kTiles.joint)
      ptx::mbarrier_wait(smem.v_full(KVRing::slot(step)), KVRing::parity(step));
  };
  // Key blocks at the right end of the tile in hand that no row of this warpgroup sees. Their K goes
  // back at once; their V in `skip_v`, behind the one that is still in use.
  auto skip_k = [&]() __attribute__((always_inline)) {
    const int skipped = tile().blocks - visit().end;
    constexpr int kMost = (kTiles.block_q() - 64 + kBlockK - 1) / kBlockK;
    static_assert(kMost + (kTiles.joint ? 2 : 0) <= kTiles.stages, "the ring would run dry");
    for (int i = 0; i < skipped; ++i) {
      await_k();
      take_turn();
      pass_turn(kTiles.turn);
      release(smem.k_empty(KVRing::slot(steps)));
      ++steps;
    }
    return skipped;
  };
  auto skip_v = [&](int skipped) __attribute__((always_inline)) {
    if constexpr (!kTiles.joint) {
      for (; skipped > 0; --skipped) {
        const uint32_t step = steps - 1 - skipped;
        await_v(step);
        __syncwarp();  // no lane falls behind the barrier's phases
        release(smem.v_empty(KVRing::slot(step)));
      }
    }
  };
  // S = Q K^T, at this warpgroup's turn.
  auto issue_qk = [&]() __attribute__((always_inline)) {
    const uint32_t q = c.q_operand(q_slot()), k = c.k_operand(KVRing::slot(steps));
    await_k();
    take_turn();
    ptx::wgmma_fence();
    c.issue_qk(q, k);
  };
  // S has arrived: K's stage is free.
  auto release_k = [&]() __attribute__((always_inline)) {
    c.pin_s();
    if constexpr (!kTiles.joint) release(smem.k_empty(KVRing::slot(steps)));
    ++steps;
  };
  // S = Q K^T of this step and O += P V of the step `behind` before, in one turn; returns when S
  // has arrived.
  auto issue_both = [&](int behind) __attribute__((always_inline)) {
    const uint32_t v = c.v_operand(KVRing::slot(steps - behind));
    issue_qk();
    pass_turn(Turn::kScores);
    await_v(steps - behind);
    ptx::wgmma_fence();
    c.issue_pv(v, started);
    started = 1;
    pass_turn(Turn::kScoresAndOutput);
    ptx::wgmma_wait<1>();
    release_k();
  };
  // O has arrived: its V's stage is free. `behind`: steps taken since that product was issued.
  auto await_o = [&](int behind) __attribute__((always_inline)) {
    ptx::wgmma_wait<0>();
    c.pin_o();
    release(smem.v_empty(KVRing::slot(steps - 1 - behind)));
  };
  // Hides what the band hides of block j, if it cuts it.
  auto mask = [&](int j) __attribute__((always_inline)) {
    if (j < visit().full_begin || j >= visit().full_end)
      c.mask(tile(), tile().first_key + j * kBlockK);
  };
  auto overflows = [&]() __attribute__((always_inline)) {
    return !(fmaxf(c.l[0], c.l[1]) <= Work::kStaleLimit);
  };
  // A stale maximum is trusted as long as P stays small; else the tile is done again, looking.
  auto judge = [&](ForwardTile& t) __attribute__((always_inline)) {
    if (overflows() && !t.looks) t.fails = true;
  };

  auto first_step = [&]() __attribute__((always_inline)) {
    const int skipped = skip_k();
    issue_qk();
    pass_turn(kTiles.turn);
    ptx::wgmma_wait<0>();
    release_k();
    release_q_early(visit().end - 1);
    skip_v(skipped);
    mask(visit().end - 1);
    c.open_rows();
    c.pack();
    started = 0;
  };
  // A step whose block every row sees whole, under the stale maximum.
  auto plain_step = [&](int j) __attribute__((always_inline)) {
    issue_both(1);
    release_q_early(j);
    c.template exponentiate<0, kS / 2>();
    // With two warpgroups in turn, the first half of P is worked out while the product with V still
    // runs: the compiler would move it behind the wait, but not across this branch (measured: +5%;
    // -10% where four warpgroups run freely).
    if constexpr (kTiles.turn != Turn::kNone) judge(tile());
    await_o(1);
    c.template exponentiate<kS / 2, kS>();
    c.pack();
  };
  auto looking_step = [&](int j) __attribute__((always_inline)) {
    issue_both(1);
    release_q_early(j);
    mask(j);
    float top[2];
    bool grown = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(c.m[half], c.row_max(half) * p.scale_log2);
      grown |= top[half] - c.m[half] > kRescaleLog2;
    }
    await_o(1);
    if (__any_sync(~0u, grown)) {
      judge(tile());  // rescaled, l would no longer tell
      c.rescale(top);
    }
    c.template exponentiate<0, kS>();
    c.pack();
  };
  auto rest_of_tile = [&]() __attribute__((always_inline)) {
    const int full_begin = tile().looks ? INT32_MAX : visit().full_begin;
    const int full_end = visit().full_end;
    int j = visit().end - 2;
#pragma unroll 1
    while (j >= 0) {
      if (j >= full_begin && j < full_end) {
#pragma unroll 1
        do plain_step(j);
        while (--j >= full_begin);
      } else {
        looking_step(j--);
      }
    }
  };
  // The last product of a tile, and its results.
  auto finish_last = [&](ForwardTile& t) __attribute__((always_inline)) {
    const uint32_t v = c.v_operand(KVRing::slot(steps - 1));
    await_v(steps - 1);
    ptx::wgmma_fence();
    c.issue_pv(v, started);
    judge(t);
    const auto rows = c.finish_rows(t);
    await_o(0);
    c.store_output(t, rows);
  };
  // The last product of the old tile goes along with the first of the tile in hand.
  auto transition_step = [&](ForwardTile& old) __attribute__((always_inline)) {
    const int skipped = skip_k();
    issue_both(1 + skipped);
    judge(old);
    mask(visit().end - 1);
    const auto rows = c.finish_rows(old);
    c.open_rows();
    c.pin_s();
    await_o(1 + skipped);
    skip_v(skipped);
    c.pack();
    c.store_output(old, rows);
    started = 0;
  };

  if (kTiles.turn != Turn::kNone && warpgroup == kTiles.consumers - 1) pass_turn(kTiles.turn);
#pragma unroll 1
  for (int round = 0; round < 2; ++round) {
    if constexpr (kTiles.q_buffers == 2) {
      bool more = next_tile();
      if (more) first_step();
      while (more) {
        rest_of_tile();
        release_q();
        ForwardTile& old = tile();
        more = next_tile();
        if (more) {
          transition_step(old);
        } else {
          finish_last(old);
        }
      }
    } else {
      while (next_tile()) {
        first_step();
        rest_of_tile();
        finish_last(tile());
      }
    }
    release_q();
    ptx::mbarrier_arrive(smem.drained());
  }
  if (lane == 0) ptx::bulk_wait<0>();  // shared memory must outlive the reads
}

}  // namespace jax_flash2::sm90
