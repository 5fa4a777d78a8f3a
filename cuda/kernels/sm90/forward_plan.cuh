// What the roles of the sm_90a forward share: parameters, the queue's order, the record of a tile, and
// the layout of shared memory.
#pragma once

#include "core/problem.h"
#include "device/smem_sm90.cuh"
#include "kernels/sm90/tiles_forward.h"

namespace jax_flash2::sm90 {

// The order in which tiles are handed out.
struct TileOrder {
  int query_tiles;    // a head
  int heads;          // B * N
  int section_heads;  // heads taken together, longest tiles first; 0: head by head

  struct Tile {
    int head, query_tile;
  };
  JF2_DEVICE int tiles() const { return query_tiles * heads; }
  JF2_DEVICE Tile at(int i) const {
    if (section_heads == 0) return {i / query_tiles, i % query_tiles};
    const int first = i / (section_heads * query_tiles) * section_heads;
    const int here = min(section_heads, heads - first);
    const int rest = i - first * query_tiles;
    return {first + rest % here, query_tiles - 1 - rest / here};
  }
};

struct ForwardParams {
  Shape shape;
  BandSpec band;
  float scale;       // of the logits
  float scale_log2;  // scale * log2(e)
  TileOrder order;
  float* lse;      // [B, N, T]
  void* out;       // [B, T, N, Hv]: for tiles that see nothing
  int* next_tile;  // the queue: tiles handed out beyond the first of each block, 0 at launch
};

// One query tile. The producer works it out and leaves it in shared memory; consumers read the few
// fields they need when they need them, and keep none in registers.
struct alignas(16) ForwardTile {
  int index;             // in the queue
  int batch, head, row;  // row: the first
  Band band;
  Range visible;             // keys that some query of the sequence sees
  int first_key, blocks;     // key blocks that some row of the tile sees
  int full_begin, full_end;  // of them, those that every row sees whole

  static constexpr int kSlots = 4;  // the producer is at most two tiles ahead
};

template <ForwardTiles kTiles>
JF2_DEVICE void fill_tile(ForwardTile& tile, const ForwardParams& p, int i) {
  constexpr int kBlockK = kTiles.block_k;
  const TileOrder::Tile t = p.order.at(i);
  const int batch = t.head / p.shape.query_heads, row = t.query_tile * kTiles.block_q();
  const Band band = p.band.at(batch, p.shape.query_len, p.shape.kv_len);
  const Range rows = {row, min(row + kTiles.block_q(), band.query_length)};
  const Range keys = band.keys_of(rows);
  const int first_key = keys.begin / kBlockK * kBlockK;
  tile.index = i;
  tile.batch = batch;
  tile.head = t.head - batch * p.shape.query_heads;
  tile.row = row;
  tile.band = band;
  tile.visible = band.keys_of({0, band.query_length});
  tile.first_key = first_key;
  tile.blocks = keys.empty() ? 0 : (keys.end - first_key + kBlockK - 1) / kBlockK;
  if (!keys.empty()) {
    tile.full_begin = (band.lo(rows.end - 1) - first_key + kBlockK - 1) / kBlockK;
    tile.full_end = (band.hi(rows.begin) - first_key) / kBlockK;
  }
}

template <ForwardTiles kTiles>
struct ForwardSmem {
  using Q = PanelTile<kTiles.block_q(), kTiles.head_dim>;
  using KV = PanelTile<kTiles.block_k, kTiles.head_dim>;
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + kTiles.q_buffers * Q::kBytes;
  static constexpr int kV = kK + kTiles.stages * KV::kBytes;
  // With one Q buffer, O leaves through it.
  static constexpr int kO = kTiles.q_buffers == 2 ? kV + kTiles.stages * KV::kBytes : kQ;
  static constexpr int kBarriers =
      kV + kTiles.stages * KV::kBytes + (kTiles.q_buffers == 2 ? Q::kBytes : 0);
  static constexpr int kTileRecords = kBarriers + 16 * (kTiles.q_buffers + 2 * kTiles.stages) + 16;
  static constexpr int kRedo = kTileRecords + int(sizeof(ForwardTile)) * ForwardTile::kSlots;
  static constexpr int kWarps = 4 * kTiles.consumers;
  static constexpr int kBytes = kRedo + 4 * kWarps;
  static constexpr int kLaunchBytes = kBytes + 1024;  // room to align the base
  static_assert(kLaunchBytes <= 232448, "Q, K, V and O must fit the 227 KB of a block");

  uint32_t base;       // shared address, aligned to 1024 bytes
  ForwardTile* tiles;  // [ForwardTile::kSlots]

  JF2_DEVICE Q q(int buffer) const { return {base + kQ + buffer * Q::kBytes}; }
  JF2_DEVICE KV k(int stage) const { return {base + kK + stage * KV::kBytes}; }
  JF2_DEVICE KV v(int stage) const { return {base + kV + stage * KV::kBytes}; }
  JF2_DEVICE Q o() const { return {base + kO}; }
  // Full: the copy engine has delivered. Empty: every consumer warp has read.
  JF2_DEVICE uint32_t q_full(int i) const { return barrier(i); }
  JF2_DEVICE uint32_t q_empty(int i) const { return barrier(kTiles.q_buffers + i); }
  JF2_DEVICE uint32_t k_full(int i) const { return stage_barrier(0, i); }
  JF2_DEVICE uint32_t k_empty(int i) const { return stage_barrier(1, i); }
  JF2_DEVICE uint32_t v_full(int i) const { return stage_barrier(2, i); }
  JF2_DEVICE uint32_t v_empty(int i) const { return stage_barrier(3, i); }
  // Every consumer warp has finished what was handed out.
  JF2_DEVICE uint32_t drained() const { return stage_barrier(4, 0); }
  // For each consumer warp, the index of the tile that it could not do with a stale maximum, or -1.
  JF2_DEVICE int* redo() const { return reinterpret_cast<int*>(tiles + ForwardTile::kSlots); }

 private:
  JF2_DEVICE uint32_t barrier(int i) const { return base + kBarriers + 8 * i; }
  JF2_DEVICE uint32_t stage_barrier(int kind, int i) const {
    return barrier(2 * kTiles.q_buffers + kind * kTiles.stages + i);
  }
};

// Where a running count stands in a ring of kSize slots: the slot, and the parity of its current
// phase, which flips each time round.
template <int kSize>
struct Ring {
  static_assert((kSize & (kSize - 1)) == 0, "rings are powers of two");
  static JF2_DEVICE int slot(uint32_t count) { return count % kSize; }
  static JF2_DEVICE uint32_t parity(uint32_t count) { return count / kSize & 1; }
};

}  // namespace jax_flash2::sm90
