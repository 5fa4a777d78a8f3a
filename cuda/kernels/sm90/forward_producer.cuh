// The producers of the sm_90a forward, a warp each: the scheduler, which takes tiles from the queue,
// works out their records and loads their Q; and the loader of K and V. Steps as in forward.cuh.
#pragma once

#include "kernels/sm90/forward_plan.cuh"

namespace jax_flash2::sm90 {

// A tile whose rows see nothing: O = 0, log-sum-exp = -inf.
template <ForwardTiles kTiles>
JF2_DEVICE void write_hidden_tile(const ForwardParams& p, const ForwardTile& tile, int lane) {
  const Shape& s = p.shape;
  const int chunks = s.value_dim / 8;  // of 16 bytes
  // A row a lane: the scheduler has few registers.
#pragma unroll 1
  for (int r = lane; r < kTiles.block_q(); r += 32) {
    const int row = tile.row + r;
    if (row >= p.rows()) break;
    const int head = tile.head + p.head_in_pack(row), token = p.token(row);
    p.lse[(int64_t(tile.batch) * s.query_heads + head) * s.query_len + token] = -INFINITY;
    uint4* out = static_cast<uint4*>(p.out) +
                 ((int64_t(tile.batch) * s.query_len + token) * s.query_heads + head) * chunks;
#pragma unroll 1
    for (int i = chunks; i > 0; --i) *out++ = make_uint4(0, 0, 0, 0);
  }
}

template <ForwardTiles kTiles>
JF2_DEVICE void schedule(const ForwardParams& p, ForwardSmem<kTiles> smem, const CUtensorMap* q_map,
                         int lane) {
  using Q = typename ForwardSmem<kTiles>::Q;
  using QRing = Ring<kTiles.q_buffers>;
  constexpr int kSlots = ForwardTile::kSlots;
  uint32_t count = 0;  // tiles handed out

  // The buffer of Q for the next tile is free.
  auto await_q = [&]() __attribute__((always_inline)) {
    ptx::mbarrier_wait(smem.q_empty(QRing::slot(count)), QRing::parity(count) ^ 1);
    __syncwarp();  // no lane falls behind the barrier's phases
  };
  // Every consumer is done with the tile whose record the next one will replace; two tiles later
  // than that at most. (With one buffer the last wait for Q has told.)
  auto await_record = [&]() __attribute__((always_inline)) {
    if constexpr (kTiles.q_buffers == 2) await_q();
  };
  auto announce = [&]() __attribute__((always_inline)) {
    if (lane == 0) ptx::mbarrier_arrive(smem.scheduled(count % kSlots));
  };
  auto hand_out = [&](int index, bool looks) __attribute__((always_inline)) {
    ForwardTile& tile = smem.tiles[count % kSlots];
    __syncwarp();  // every lane has read the old record
    if (lane == 0) fill_tile<kTiles>(tile, p, index, looks);
    __syncwarp();
    if (tile.blocks == 0) return write_hidden_tile<kTiles>(p, tile, lane);
    announce();
    if constexpr (kTiles.q_buffers == 1) await_q();
    if (lane == 0) {
      const int slot = QRing::slot(count);
      ptx::mbarrier_arrive_expect_tx(smem.q_full(slot), Q::kBytes);
      load_rows(smem.q(slot), q_map, smem.q_full(slot), tile.head, p.token(tile.row), tile.batch);
    }
    ++count;
  };
  // The end of a round travels as a tile without keys.
  auto hand_out_end = [&]() __attribute__((always_inline)) {
    await_q();
    if (lane == 0) {
      smem.tiles[count % kSlots].blocks = 0;
      ptx::mbarrier_arrive(smem.q_full(QRing::slot(count)));
    }
    announce();
    ++count;
  };

  // The queue; a tile that failed goes first.
  int next = blockIdx.x;
#pragma unroll 1
  while (true) {
    await_record();
    const ForwardTile& old = smem.tiles[count % kSlots];
    const bool again = old.fails;
    if (again) {
      next = old.index;
    } else if (next < 0) {
      // Asked for as late as Q's loading allows: a block that is behind takes fewer.
      if (lane == 0) next = atomicAdd(p.next_tile, 1) + p.blocks;
      next = __shfl_sync(~0u, next, 0);
    }
    if (next >= p.order.tiles()) break;
    hand_out(next, again);
    next = -1;
  }
  // What failed of the last tiles.
  hand_out_end();
  ptx::mbarrier_wait(smem.drained(), 0);
  const uint32_t end = count;
#pragma unroll 1
  for (uint32_t i = end; i < end + kSlots - 1; ++i) {
    const ForwardTile& old = smem.tiles[i % kSlots];
    if (!old.fails) continue;
    await_record();
    hand_out(old.index, true);
  }
  hand_out_end();
}

template <ForwardTiles kTiles>
JF2_DEVICE void load(ForwardSmem<kTiles> smem, const CUtensorMap* k_map, const CUtensorMap* v_map,
                     int lane) {
  using KV = typename ForwardSmem<kTiles>::KV;
  using KVRing = Ring<kTiles.stages>;
  constexpr int kSlots = ForwardTile::kSlots;
  // V is needed a step later than K. With stages of its own it is asked for a step later too.
  constexpr int kLag = kTiles.joint ? 0 : 1;
  uint32_t steps = 0;    // K tiles asked for
  uint32_t cleared = 0;  // V tiles with values that no query of the sequence sees
  int ends = 0;
#pragma unroll 1
  for (uint32_t count = 0; ends < 2; ++count) {
    ptx::mbarrier_wait(smem.scheduled(count % kSlots), count / kSlots & 1);
    // Lane 0 reads the record for all.
    const auto field = [&](const int& x) { return ptx::uniform(lane == 0 ? x : 0); };
    const ForwardTile& tile = smem.tiles[count % kSlots];
    const int batch = field(tile.batch), kv_head = field(tile.kv_head);
    const int first_key = field(tile.first_key), blocks = field(tile.blocks);
    const Range visible = {field(tile.visible.begin), field(tile.visible.end)};
    if (blocks == 0) ++ends;
#pragma unroll 1
    for (int j = blocks - 1; j >= -kLag; --j) {
      __syncwarp();  // as in the scheduler
      const int key = first_key + j * kTiles.block_k, v_key = key + kLag * kTiles.block_k;
      const bool hides = v_key < visible.begin || v_key + kTiles.block_k > visible.end;
      if (j >= 0) {
        const int slot = KVRing::slot(steps);
        const uint32_t full = kTiles.joint && hides ? smem.v_landed() : smem.k_full(slot);
        ptx::mbarrier_wait(smem.k_empty(slot), KVRing::parity(steps) ^ 1);
        if (lane == 0) {
          ptx::mbarrier_arrive_expect_tx(full, (kTiles.joint ? 2 : 1) * KV::kBytes);
          load_rows(smem.k(slot), k_map, full, kv_head, key, batch);
        }
        ++steps;
      }
      if (j + kLag < blocks) {
        const uint32_t step = steps - 1 - (j >= 0 ? kLag : 0);
        const int slot = KVRing::slot(step);
        const uint32_t full = hides ? smem.v_landed() : smem.v_full(slot);
        if constexpr (!kTiles.joint)
          ptx::mbarrier_wait(smem.v_empty(slot), KVRing::parity(step) ^ 1);
        if (lane == 0) {
          if constexpr (!kTiles.joint) ptx::mbarrier_arrive_expect_tx(full, KV::kBytes);
          load_rows(smem.v(slot), v_map, full, kv_head, v_key, batch);
        }
        if (hides) {
          ptx::mbarrier_wait(full, cleared++ & 1);
          clear_hidden_rows(smem.v(slot), v_key, visible, lane);
          if (lane == 0) ptx::mbarrier_arrive(smem.v_full(slot));
        }
      }
    }
  }
}

}  // namespace jax_flash2::sm90
