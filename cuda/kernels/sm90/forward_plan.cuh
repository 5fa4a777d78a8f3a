// What the roles of the sm_90a forward share: parameters, the queue's order, the record of a tile, and
// the layout of shared memory.
#pragma once

#include "core/problem.h"
#include "device/ring.cuh"
#include "device/smem_sm90.cuh"
#include "kernels/sm90/tile_order.cuh"
#include "kernels/sm90/tiles_forward.h"

namespace jax_flash2::sm90 {

struct ForwardParams {
  Shape shape;
  BandSpec band;
  float scale_log2;  // scale * log2(e)
  int pack_log2;     // a tile's rows are 2^pack_log2 heads of a group at each of its tokens
  int packs;         // of a sequence: N / 2^pack_log2
  TileOrder order;   // of packs
  int blocks;        // of the grid; the first tile of each is its own number
  float* lse;        // [B, N, T]
  void* out;         // [B, T, N, Hv]
  int* next_tile;    // the queue: tiles handed out beyond those, 0 at launch

  // Row r of a pack of heads. Row r + 8 is of the same head.
  // Opaque: read again, not kept in one of the scheduler's few registers.
  JF2_DEVICE int token(int r) const { return r >> ptx::opaque(pack_log2); }
  JF2_DEVICE int head_in_pack(int r) const { return r & ((1 << pack_log2) - 1); }
  JF2_DEVICE int eighth_token() const { return 8 >> pack_log2; }
  JF2_DEVICE int rows() const { return shape.query_len << pack_log2; }
};

// What a warpgroup visits of a tile: key blocks, counted from the tile's first.
struct alignas(16) Visit {
  int end;  // past the last that one of its rows sees
  // Those that each of its rows sees whole, and a key behind them, from whose block it has a maximum.
  int full_begin, full_end;
};

// One query tile. The scheduler works it out and leaves it in shared memory; the others read the few
// fields they need when they need them, and keep few in registers.
struct alignas(16) ForwardTile {
  int index;                      // in the queue
  int batch, head, kv_head, row;  // head, row: the first
  Band band;
  Range visible;          // keys that some query of the sequence sees; no end where the buffer ends
  int first_key, blocks;  // key blocks that some row of the tile sees
  bool looks;             // for the row maximum in every block: the tile is done again
  bool fails;             // set by consumers: a stale maximum will not do
  Visit visits[4];        // of the warpgroups

  static constexpr int kSlots = 4;  // the scheduler is at most two tiles ahead
};

// The record of tile `i`. By one thread: whoever waits for it may read all that this one wrote.
template <ForwardTiles kTiles>
JF2_DEVICE void fill_tile(ForwardTile& tile, const ForwardParams& p, int i, bool looks) {
  constexpr int kBlockK = kTiles.block_k;
  const TileOrder::Tile t = p.order.at(i);
  const int batch = t.head / p.packs, row = t.query_tile * kTiles.block_q();
  const Band band = p.band.at(batch, p.shape.query_len, p.shape.kv_len);
  const Range keys = band.keys_of({p.token(row), p.token(row + kTiles.block_q())});
  const int first_key = keys.begin / kBlockK * kBlockK;
  const int blocks = keys.empty() ? 0 : (keys.end - first_key + kBlockK - 1) / kBlockK;
  tile.index = i;
  tile.batch = batch;
  tile.head = (t.head - batch * p.packs) << p.pack_log2;
  tile.kv_head = tile.head / p.shape.group();
  tile.row = row;
  tile.band = band;
  tile.visible = band.keys_of({0, band.query_length});
  if (tile.visible.end == p.shape.kv_len) tile.visible.end = INT32_MAX;  // reads there give 0
  tile.first_key = first_key;
  tile.blocks = blocks;
  tile.looks = looks;
  tile.fails = false;
#pragma unroll 1
  for (int w = 0; w < kTiles.consumers; ++w) {
    const int first = ptx::opaque(tile.row) + w * 64;
    const int begin = p.token(first), end = min(p.token(first + 64), band.query_length);
    const Range own = band.keys_of({begin, end});
    // A warpgroup that sees nothing goes along, and hides all of it.
    tile.visits[w] = own.empty() ? Visit{blocks, blocks, 0}
                                 : Visit{(own.end - 1 - first_key) / kBlockK + 1,
                                         (band.lo(end - 1) - first_key + kBlockK - 1) / kBlockK,
                                         (band.hi(begin) - 1 - first_key) / kBlockK};
  }
}

template <ForwardTiles kTiles>
struct ForwardSmem {
  using Q = PanelTile<kTiles.block_q(), kTiles.head_dim>;
  using KV = PanelTile<kTiles.block_k, kTiles.head_dim>;
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + kTiles.q_buffers * Q::kBytes;
  static constexpr int kV = kK + kTiles.stages * KV::kBytes;
  static constexpr int kO = kV + kTiles.stages * KV::kBytes;
  static constexpr int kBarriers = kO + (kTiles.q_buffers == 2 ? Q::kBytes : 0);
  static constexpr int kBarrierCount =
      2 * kTiles.q_buffers + 4 * kTiles.stages + ForwardTile::kSlots + 2;
  static constexpr int kTileRecords = kBarriers + 8 * kBarrierCount;
  static constexpr int kBytes = kTileRecords + int(sizeof(ForwardTile)) * ForwardTile::kSlots;
  static constexpr int kLaunchBytes = kBytes + 1024;  // room to align the base
  static_assert(kTileRecords % alignof(ForwardTile) == 0);
  static_assert(kLaunchBytes <= 232448, "Q, K, V and O must fit the 227 KB of a block");
  static constexpr int kWarps = 4 * kTiles.consumers, kThreads = 32 * kWarps;  // of consumers

  uint32_t base;       // shared address, aligned to 1024 bytes
  ForwardTile* tiles;  // [ForwardTile::kSlots]

  JF2_DEVICE Q q(int buffer) const { return {base + kQ + buffer * Q::kBytes}; }
  JF2_DEVICE KV k(int stage) const { return {base + kK + stage * KV::kBytes}; }
  JF2_DEVICE KV v(int stage) const { return {base + kV + stage * KV::kBytes}; }
  JF2_DEVICE Q o() const { return {base + kO}; }
  // Full: the copy engine has delivered. Empty: every consumer warp (of Q, every thread) has read.
  JF2_DEVICE uint32_t q_full(int i) const { return barrier(i); }
  JF2_DEVICE uint32_t q_empty(int i) const { return barrier(kTiles.q_buffers + i); }
  JF2_DEVICE uint32_t k_full(int i) const { return stage_barrier(0, i); }
  JF2_DEVICE uint32_t k_empty(int i) const { return stage_barrier(1, i); }
  JF2_DEVICE uint32_t v_full(int i) const { return stage_barrier(kTiles.joint ? 0 : 2, i); }
  JF2_DEVICE uint32_t v_empty(int i) const { return stage_barrier(kTiles.joint ? 1 : 3, i); }
  // The record of a tile stands.
  JF2_DEVICE uint32_t scheduled(int slot) const { return stage_barrier(4, slot); }
  // A V tile that has to be cleared in part has landed.
  JF2_DEVICE uint32_t v_landed() const { return stage_barrier(4, ForwardTile::kSlots); }
  // Every consumer thread has finished what was handed out.
  JF2_DEVICE uint32_t drained() const { return stage_barrier(4, ForwardTile::kSlots + 1); }

 private:
  JF2_DEVICE uint32_t barrier(int i) const { return base + kBarriers + 8 * i; }
  JF2_DEVICE uint32_t stage_barrier(int kind, int i) const {
    return barrier(2 * kTiles.q_buffers + kind * kTiles.stages + i);
  }
};

}  // namespace jax_flash2::sm90
