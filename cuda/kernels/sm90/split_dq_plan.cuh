// What the roles of the sm_90a split mode's dQ share: parameters, the record of a query tile, and the
// layout of shared memory.
#pragma once

#include "core/problem.h"
#include "device/ring.cuh"
#include "device/row_terms.cuh"
#include "device/smem_sm90.cuh"
#include "kernels/sm90/tile_order.cuh"
#include "kernels/sm90/tiles_backward.h"

namespace jax_flash2::sm90 {

struct DqParams {
  Shape shape;
  BandSpec band;
  float scale;
  float scale_log2;  // scale * log2(e)
  TileOrder order;
  const char* row_terms;  // as in BackwardParams
  void* dq;               // [B, T, N, H]
  int* next_tile;         // the queue: tiles handed out beyond the first of each thread block
};

// One query tile. The loader works it out and leaves it in shared memory.
struct alignas(16) DqTile {
  int batch, head, kv_head, row;  // row: the first
  int first_key, blocks;          // key blocks that some row of the tile sees
  Band band;
  Range visible;  // keys that some query of the sequence sees
  bool live;      // false: the queue is empty
  int next;       // index in the queue of the tile that follows

  static constexpr int kSlots = 2;
};

template <DqTiles kTiles>
JF2_DEVICE void fill_dq_tile(DqTile& tile, const DqParams& p, int i) {
  tile.live = i < p.order.tiles();
  if (!tile.live) return;
  const TileOrder::Tile t = p.order.at(i);
  tile.batch = t.head / p.shape.query_heads;
  tile.head = t.head - tile.batch * p.shape.query_heads;
  tile.kv_head = tile.head / p.shape.group();
  tile.row = t.query_tile * kTiles.block_q();
  tile.band = p.band.at(tile.batch, p.shape.query_len, p.shape.kv_len);
  tile.visible = tile.band.keys_of({0, tile.band.query_length});
  const Range keys = tile.band.keys_of({tile.row, tile.row + kTiles.block_q()});
  tile.first_key = keys.begin / kTiles.block_k * kTiles.block_k;
  tile.blocks =
      keys.empty() ? 0 : (keys.end - tile.first_key + kTiles.block_k - 1) / kTiles.block_k;
}

template <DqTiles kTiles>
struct DqSmem {
  using Q = PanelTile<kTiles.block_q(), kTiles.head_dim>;
  using KV = PanelTile<kTiles.block_k, kTiles.head_dim>;
  static constexpr int kDout = Q::kBytes;
  static constexpr int kK = 2 * Q::kBytes;
  static constexpr int kV = kK + kTiles.k_stages * KV::kBytes;
  static constexpr int kBarriers = kV + kTiles.v_stages * KV::kBytes;
  static constexpr int kBarrierCount =
      2 * (kTiles.consumers + kTiles.k_stages + kTiles.v_stages) + DqTile::kSlots + 1;
  static constexpr int kTileRecords = (kBarriers + 8 * kBarrierCount + 15) / 16 * 16;
  static constexpr int kBytes = kTileRecords + int(sizeof(DqTile)) * DqTile::kSlots;
  static constexpr int kLaunchBytes = kBytes + 1024;  // room to align the base
  static_assert(kLaunchBytes <= 232448, "Q, dO, K and V must fit the 227 KB of a block");

  uint32_t base;  // shared address, aligned to 1024 bytes
  DqTile* tiles;  // [DqTile::kSlots]

  JF2_DEVICE Q q() const { return {base}; }
  JF2_DEVICE Q dout() const { return {base + kDout}; }
  JF2_DEVICE KV k(int stage) const { return {base + kK + stage * KV::kBytes}; }
  JF2_DEVICE KV v(int stage) const { return {base + kV + stage * KV::kBytes}; }
  // The record of a tile stands and a warpgroup's rows of Q and dO have arrived; they have been read.
  JF2_DEVICE uint32_t rows_full(int warpgroup) const { return barrier(warpgroup); }
  JF2_DEVICE uint32_t rows_empty(int warpgroup) const {
    return barrier(kTiles.consumers + warpgroup);
  }
  JF2_DEVICE uint32_t k_full(int stage) const { return barrier(2 * kTiles.consumers + stage); }
  JF2_DEVICE uint32_t k_empty(int stage) const { return k_full(kTiles.k_stages + stage); }
  JF2_DEVICE uint32_t v_full(int stage) const { return k_full(2 * kTiles.k_stages + stage); }
  JF2_DEVICE uint32_t v_empty(int stage) const { return v_full(kTiles.v_stages + stage); }
  JF2_DEVICE uint32_t record_empty(int slot) const { return v_full(2 * kTiles.v_stages + slot); }
  // A K tile that has to be cleared in part has landed.
  JF2_DEVICE uint32_t landed() const { return record_empty(DqTile::kSlots); }

 private:
  JF2_DEVICE uint32_t barrier(int i) const { return base + kBarriers + 8 * i; }
};

}  // namespace jax_flash2::sm90
