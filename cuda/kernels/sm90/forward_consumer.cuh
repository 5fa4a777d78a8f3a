// The consumers of the sm_90a forward: the order of products, waits and hand-overs. Steps as in
// forward.cuh.
#pragma once

#include "kernels/sm90/forward_warp.cuh"

namespace jax_flash2::sm90 {

// A stale maximum is kept until the true one exceeds it by this much (log2): P stays below 2^8, far
// from float16's largest number, and most blocks need no rescaling of O.
inline constexpr float kRescaleLog2 = 8.f;

// Zeroes the rows of a V tile that no query of the sequence sees: 0 * NaN would reach O.
template <ForwardTiles kTiles>
JF2_DEVICE void clear_hidden_values(typename ForwardSmem<kTiles>::KV v, int key, Range visible) {
  constexpr int kChunks = ForwardSmem<kTiles>::KV::kPanels * 8;
  for (int i = threadIdx.x - 128; i < kTiles.block_k * kChunks; i += 128 * kTiles.consumers) {
    const int row = i / kChunks;
    if (key + row >= visible.begin && key + row < visible.end) continue;
    const uint32_t a = v.address(row, i % kChunks * 8);
    ptx::sts_f32x2(a, 0.f, 0.f);
    ptx::sts_f32x2(a + 8, 0.f, 0.f);
  }
  ptx::fence_proxy_async();
  ptx::barrier_sync(kAllConsumers, 128 * kTiles.consumers);
}

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
  bool v_cut = false;  // the band cuts the block whose P waits for its product with V
  Trust trust = Trust::kStale;

  auto release = [&](uint32_t empty) __attribute__((always_inline)) {
    if (lane == 0) ptx::mbarrier_arrive(empty);
  };
  // The tile in hand, and the one before it.
  auto tile = [&](int back = 0) __attribute__((always_inline)) -> const ForwardTile& {
    return smem.tiles[(count - 1 - back) % kSlots];
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
    __syncwarp();  // with the buffer goes the record of an older tile, which every lane has read
    release(smem.q_empty(q_slot()));
  };
  auto await_v = [&]() __attribute__((always_inline)) {
    ptx::mbarrier_wait(smem.v_full(KVRing::slot(steps - 1)), KVRing::parity(steps - 1));
  };
  // Before the product with V of block j of tile t: values that no query of the sequence sees
  // become 0.
  auto clear_hidden = [&](const ForwardTile& t, int j) __attribute__((always_inline)) {
    if (!v_cut) return;
    const Range visible = t.visible;
    const int key = t.first_key + j * kBlockK;
    const bool right = key + kBlockK > visible.end && visible.end < p.shape.kv_len;
    if (key >= visible.begin && !right) return;
    await_v();
    clear_hidden_values<kTiles>(smem.v(KVRing::slot(steps - 1)), key, visible);
  };
  // S = Q K^T, at this warpgroup's turn.
  auto issue_qk = [&]() __attribute__((always_inline)) {
    ptx::mbarrier_wait(smem.k_full(KVRing::slot(steps)), KVRing::parity(steps));
    take_turn();
    ptx::wgmma_fence();
    c.issue_qk(q_slot(), KVRing::slot(steps));
  };
  // S has arrived: K's stage is free.
  auto release_k = [&]() __attribute__((always_inline)) {
    c.pin_s();
    release(smem.k_empty(KVRing::slot(steps)));
    ++steps;
  };
  // S = Q K^T of this step and O += P V of the last, in one turn; returns when S has arrived.
  auto issue_both = [&]() __attribute__((always_inline)) {
    issue_qk();
    pass_turn(Turn::kScores);
    await_v();
    ptx::wgmma_fence();
    c.issue_pv(KVRing::slot(steps - 1));
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
  // S -> P, m and l of a tile's first block. A row that sees nothing yet starts far below any
  // score.
  auto open_rows = [&]() __attribute__((always_inline)) {
    float m_log2[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      c.m[half] = fmaxf(c.row_max(half), -1e30f);
      m_log2[half] = c.m[half] * p.scale_log2;
      c.l[half] = 0.f;
    }
    c.template exponentiate<0, kS>(m_log2, c.l);
  };
  auto finish_last = [&](const ForwardTile& t) __attribute__((always_inline)) {
    clear_hidden(t, 0);
    await_v();
    ptx::wgmma_fence();
    c.issue_pv(KVRing::slot(steps - 1));
    c.finish_rows(t);
    await_o(0);
    c.finish_output(t, c.l);
    c.zero_o();
  };
  // Does the band cut block j of the tile in hand?
  auto is_cut = [&](int j) __attribute__((always_inline)) {
    return j < tile().full_begin || j >= tile().full_end;
  };
  auto mask = [&](int j) __attribute__((always_inline)) {
    c.mask(tile(), tile().first_key + j * kBlockK);
  };
  // A stale maximum is trusted as long as P stays small; else the tile is done again, looking.
  auto note_redo = [&]() __attribute__((always_inline)) {
    smem.redo()[warpgroup * 4 + c.warp] = tile().index;
  };
  auto distrust = [&](const float (&sum)[2]) __attribute__((always_inline)) {
    if (trust == Trust::kStale && __any_sync(~0u, !(fmaxf(sum[0], sum[1]) <= Work::kStaleLimit))) {
      note_redo();
      trust = Trust::kNothing;
    }
  };
  auto first_step = [&]() __attribute__((always_inline)) {
    const int j = tile().blocks - 1;
    v_cut = is_cut(j);
    issue_qk();
    pass_turn(kTiles.turn);
    ptx::wgmma_wait<0>();
    release_k();
    if (v_cut) mask(j);
    open_rows();
    c.pack();
  };
  auto inner_step = [&](int j) __attribute__((always_inline)) {
    const bool cut = is_cut(j), looks = trust != Trust::kStale || cut;
    clear_hidden(tile(), j + 1);
    v_cut = cut;
    issue_both();
    float top[2] = {c.m[0], c.m[1]}, sum[2] = {0.f, 0.f};
    bool grown = false;
    if (looks) {
      if (cut) mask(j);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[half] = fmaxf(c.m[half], c.row_max(half));
        grown |= (top[half] - c.m[half]) * p.scale_log2 > kRescaleLog2;
      }
      grown = __any_sync(~0u, grown);
      if (!grown) top[0] = c.m[0], top[1] = c.m[1];
    }
    const float m_log2[2] = {top[0] * p.scale_log2, top[1] * p.scale_log2};
    c.template exponentiate<0, kS / 2>(m_log2, sum);
    // With two warpgroups in turn, the first half of P is worked out while the product with V still
    // runs: the compiler would move it behind the wait, but not across this branch (measured: +5%;
    // -10% where four warpgroups run freely).
    if constexpr (kTiles.turn != Turn::kNone) {
      if (!looks && !(fmaxf(sum[0], sum[1]) <= Work::kStaleLimit)) note_redo();
    }
    await_o(1);
    c.template exponentiate<kS / 2, kS>(m_log2, sum);
    if (grown) c.rescale(top);
    distrust(sum);
    c.l[0] += sum[0];
    c.l[1] += sum[1];
    c.pack();
  };
  // The last product of the old tile goes along with the first of the tile in hand.
  auto transition_step = [&](const ForwardTile& old) __attribute__((always_inline)) {
    const int j = tile().blocks - 1;
    clear_hidden(old, 0);
    v_cut = is_cut(j);
    issue_both();
    if (v_cut) mask(j);
    c.finish_rows(old);
    const float inverse[2] = {c.l[0], c.l[1]};
    open_rows();
    c.pin_s();
    await_o(1);
    c.pack();
    c.finish_output(old, inverse);
    c.zero_o();
  };

  if (kTiles.turn != Turn::kNone && warpgroup == kTiles.consumers - 1) pass_turn(kTiles.turn);
  c.zero_o();
#pragma unroll 1
  while (true) {  // two rounds: the queue, then what has to be done again
    if constexpr (kTiles.q_buffers == 2) {
      bool more = next_tile();
      if (more) first_step();
      while (more) {
        for (int j = tile().blocks - 2; j >= 0; --j) inner_step(j);
        release_q();
        const ForwardTile& old = tile();
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
        for (int j = tile().blocks - 2; j >= 0; --j) inner_step(j);
        finish_last(tile());
        if (lane == 0) ptx::bulk_wait_read<0>();  // O has left Q's buffer
        release_q();
      }
    }
    // O is written: what is done again must come after it, and shared memory must outlive the
    // reads.
    if (lane == 0) ptx::bulk_wait<0>();
    release_q();
    release(smem.drained());
    if (trust == Trust::kLastRound) break;
    trust = Trust::kLastRound;
  }
}

}  // namespace jax_flash2::sm90
