// The producer of the sm_90a forward: one warp that keeps the copy engine busy. Steps as in forward.cuh.
#pragma once

#include "kernels/sm90/forward_plan.cuh"

namespace jax_flash2::sm90 {

JF2_DEVICE void load_rows(uint32_t shared, int panel_bytes, int panels, const CUtensorMap* map,
                          uint32_t full, int head, int row, int batch) {
  ptx::mbarrier_arrive_expect_tx(full, panels * panel_bytes);
  for (int panel = 0; panel < panels; ++panel)
    ptx::tma_load_4d(shared + panel * panel_bytes, map, full, panel * kPanelCols, head, row, batch);
}

// A tile whose rows see nothing: O = 0, log-sum-exp = -inf.
template <ForwardTiles kTiles>
JF2_DEVICE void write_hidden_tile(const ForwardParams& p, const ForwardTile& tile, int lane) {
  const Shape& s = p.shape;
  const int rows = min(kTiles.block_q(), s.query_len - tile.row);
  for (int r = lane; r < rows; r += 32)
    p.lse[(int64_t(tile.batch) * s.query_heads + tile.head) * s.query_len + tile.row + r] =
        -INFINITY;
  const int chunks = s.value_dim / 8;  // of 16 bytes
  uint4* out = static_cast<uint4*>(p.out);
  for (int i = lane; i < rows * chunks; i += 32) {
    const int64_t row = int64_t(tile.batch) * s.query_len + tile.row + i / chunks;
    out[(row * s.query_heads + tile.head) * chunks + i % chunks] = make_uint4(0, 0, 0, 0);
  }
}

template <ForwardTiles kTiles>
JF2_DEVICE void produce(const ForwardParams& p, ForwardSmem<kTiles> smem, const CUtensorMap* q_map,
                        const CUtensorMap* k_map, const CUtensorMap* v_map, int lane) {
  using Q = typename ForwardSmem<kTiles>::Q;
  using KV = typename ForwardSmem<kTiles>::KV;
  using QRing = Ring<kTiles.q_buffers>;
  using KVRing = Ring<kTiles.stages>;
  uint32_t count = 0, k_count = 0, v_count = 0;  // tiles, K and V tiles handed out
  const int group = p.shape.group(), tiles = p.order.tiles();

  // V of a step is loaded after K of the step that follows it.
  bool v_waits = false;
  int v_head = 0, v_key = 0, v_batch = 0;
  auto load_waiting_v = [&]() __attribute__((always_inline)) {
    if (!v_waits) return;
    const int slot = KVRing::slot(v_count);
    ptx::mbarrier_wait(smem.v_empty(slot), KVRing::parity(v_count) ^ 1);
    if (lane == 0)
      load_rows(smem.v(slot).base, KV::kPanelBytes, KV::kPanels, v_map, smem.v_full(slot), v_head,
                v_key, v_batch);
    ++v_count;
    v_waits = false;
  };

  // Streams tile `index`. Returns the next of the queue if `fetch`: asked for early, so that the
  // round trip hides behind this tile's loads.
  auto hand_out = [&](int index, bool fetch) __attribute__((always_inline)) {
    int next = 0;
    ForwardTile& tile = smem.tiles[count % ForwardTile::kSlots];
    // One Q buffer is free only after the old tile's last product, which needs its last V.
    if constexpr (kTiles.q_buffers == 1) load_waiting_v();
    const int q_slot = QRing::slot(count);
    ptx::mbarrier_wait(smem.q_empty(q_slot), QRing::parity(count) ^ 1);
    if (lane == 0) {
      fill_tile<kTiles>(tile, p, index);
      if (fetch) next = atomicAdd(p.next_tile, 1) + gridDim.x;
    }
    __syncwarp();
    const int head = tile.head, kv_head = head / group, batch = tile.batch, blocks = tile.blocks;
    int key = tile.first_key + blocks * kTiles.block_k;
    if (blocks == 0) {
      write_hidden_tile<kTiles>(p, tile, lane);
    } else {
      if (lane == 0)
        load_rows(smem.q(q_slot).base, Q::kPanelBytes, Q::kPanels, q_map, smem.q_full(q_slot), head,
                  tile.row, batch);
      ++count;
    }
    for (int j = 0; j < blocks; ++j) {
      key -= kTiles.block_k;
      const int slot = KVRing::slot(k_count);
      ptx::mbarrier_wait(smem.k_empty(slot), KVRing::parity(k_count) ^ 1);
      if (lane == 0)
        load_rows(smem.k(slot).base, KV::kPanelBytes, KV::kPanels, k_map, smem.k_full(slot),
                  kv_head, key, batch);
      ++k_count;
      load_waiting_v();
      v_waits = true, v_head = kv_head, v_key = key, v_batch = batch;
    }
    return __shfl_sync(~0u, next, 0);
  };
  // The end of a round travels as a tile without keys.
  auto hand_out_end = [&]() __attribute__((always_inline)) {
    load_waiting_v();
    ptx::mbarrier_wait(smem.q_empty(QRing::slot(count)), QRing::parity(count) ^ 1);
    if (lane == 0) {
      smem.tiles[count % ForwardTile::kSlots].blocks = 0;
      ptx::mbarrier_arrive(smem.q_full(QRing::slot(count)));
    }
    ++count;
  };

  // Two rounds: the queue, then what consumers found that they have to do again.
  int next = blockIdx.x, done = 0;
#pragma unroll 1
  for (int round = 0; round < 2; ++round) {
    while (true) {
      if (round == 1) {
        const int* redo = smem.redo();
        next = -1;
        while (next < 0 && done < ForwardSmem<kTiles>::kWarps) {
          next = redo[done];
          for (int i = 0; i < done; ++i)
            if (redo[i] == next) next = -1;  // another warp's too
          ++done;
        }
      }
      if (round == 0 ? next >= tiles : next < 0) break;
      next = hand_out(next, round == 0);
    }
    hand_out_end();
    ptx::mbarrier_wait(smem.drained(), round);
  }
}

}  // namespace jax_flash2::sm90
