// The sm_90a forward for float16 and bfloat16: FlashAttention-2's algorithm (cuda/README.md, steps
// F1 to F7) with warp-specialised roles.
//
//   1 A persistent block takes query tiles (kBlockQ rows of one head) from a queue until it is
//   empty. 2 The producer thread fetches the next tile's number, loads its Q, and streams the K and
//   V tiles
//     that the band shows, right to left, through a ring of stages: K(j) before V(j + 1).
//   3 Each consumer warpgroup owns 64 rows. One step of its flat loop over (tile, key block):
//     a  S = Q K(j)^T and O += P V(of the step before) go to the tensor cores together;
//     b  S arrives: K's stage is free; mask it if the band cuts the block; row maximum;
//     c  P = 2^(scale S - m) while the second product still runs;
//     d  O arrives: V's stage is free. If the step opened a new tile, the old one is finished here:
//        O / l through shared memory to global, log-sum-exp beside it. Else O and l are rescaled if
//        the maximum grew by more than kRescaleLog2.
//   4 Where the tile's row says so, a warpgroup issues its products in turn (ping-pong), so that
//   one's
//     softmax runs under the other's products.
//   5 The row maximum is looked for in a tile's first block and in blocks that the band cuts; in
//   between
//     the stale one serves, and no time goes into maxima. If P grows too large under it
//     (kStaleLimit), the warp puts the tile on a list and looks from then on; the list is done
//     again in a second round.
#pragma once

#include "core/problem.h"
#include "device/math.cuh"
#include "device/smem_sm90.cuh"
#include "kernels/sm90/tiles_forward.h"

namespace jax_flash2::sm90 {

// A stale maximum is kept until the true one exceeds it by this much (log2): P stays below 2^8, far
// from float16's largest number, and most blocks need no rescaling of O.
inline constexpr float kRescaleLog2 = 8.f;

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

// ---- producer: one warp
// ---------------------------------------------------------------------------

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

// ---- consumer -----------------------------------------------------------------------------------

enum NamedBarrier {
  kTurn = 1,
  kWarpgroup = 5,
  kAllConsumers = 9
};  // + warpgroup for the first two

// What a warp takes for the row maximum of a block that the band does not cut: the stale one, until
// that failed once; in the second round, which does those tiles again, nothing but a look.
enum class Trust { kStale, kNothing, kLastRound };

template <ForwardTiles kTiles, typename Math>
struct Consumer {
  using Smem = ForwardSmem<kTiles>;
  using Element = typename Math::Element;
  static constexpr int kS = kTiles.block_k / 2, kO = kTiles.head_dim / 2;  // registers
  using QkMma = ptx::Wgmma<kTiles.block_k, Element>;
  using PvMma = ptx::Wgmma<kTiles.head_dim, Element>;

  const ForwardParams& p;
  const Smem smem;
  const CUtensorMap* out_map;
  const int warpgroup, warp, lane;  // warp within the warpgroup

  // Sums of a thread's P in one step beyond which the stale maximum is not trusted: far below what
  // P as an element and O as a float32 can hold.
  static constexpr float kStaleLimit = kLargest<Element> < 1e5f ? 32768.f : 16777216.f;

  float s[kS], o[kO];
  uint32_t packed[kTiles.block_k / 4];
  float m[2], l[2];  // of rows g and g + 8; l of this thread's columns alone

  JF2_DEVICE int row_in_tile() const { return warpgroup * 64 + warp * 16 + (lane >> 2); }

  JF2_DEVICE void issue_qk(int q_slot, int k_slot) {
    const uint32_t q =
        ptx::opaque(smem.q(q_slot).k_major() + Smem::Q::k_major_offset(warpgroup * 64, 0));
    const uint32_t k = ptx::opaque(smem.k(k_slot).k_major());
#pragma unroll
    for (int d = 0; d < kTiles.head_dim; d += 16)
      QkMma::template ss<false, false>(s, q + Smem::Q::k_major_offset(0, d),
                                       k + Smem::KV::k_major_offset(0, d), d > 0);
    ptx::wgmma_commit();
  }
  JF2_DEVICE void issue_pv(int v_slot) {
    const uint32_t v = ptx::opaque(smem.v(v_slot).outer_major());
#pragma unroll
    for (int k = 0; k < kTiles.block_k; k += 16) {
      const uint32_t (&a)[4] = *reinterpret_cast<const uint32_t (*)[4]>(&packed[k / 4]);
      PvMma::template rs<true>(o, a, v + Smem::KV::outer_major_offset(k), 1);
    }
    ptx::wgmma_commit();
  }

  // Hides what the band hides of the block of keys at `key`.
  JF2_DEVICE void mask(const ForwardTile& tile, int key) {
    const int column = key + (lane & 3) * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(tile.row + row_in_tile() + half * 8, tile.band.query_length - 1);
      const int lo = tile.band.lo(row) - column, hi = tile.band.hi(row) - column;
#pragma unroll
      for (int j = 0; j < kS / 4; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = j * 8 + e;
          float& x = s[j * 4 + half * 2 + e];
          if (c < lo || c >= hi) x = -INFINITY;
        }
    }
  }
  JF2_DEVICE float row_max(int half) const {
    float x = fmaxf(s[half * 2], s[half * 2 + 1]);
#pragma unroll
    for (int j = 1; j < kS / 4; ++j)
      x = fmaxf(x, fmaxf(s[j * 4 + half * 2], s[j * 4 + half * 2 + 1]));
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  }
  // s -> 2^(scale_log2 s - m) for the score registers [kBegin, kEnd), adding them to `sum`.
  template <int kBegin, int kEnd>
  JF2_DEVICE void exponentiate(const float (&m_log2)[2], float (&sum)[2]) {
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      const int half = (i >> 1) & 1;
      s[i] = ptx::ex2(fmaf(s[i], p.scale_log2, -m_log2[half]));
      sum[half] += s[i];
    }
  }
  // Moves O and l to the maximum `top`, where it has grown.
  JF2_DEVICE void rescale(const float (&top)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = ptx::ex2((m[half] - top[half]) * p.scale_log2);
      m[half] = top[half];
      l[half] *= factor;
#pragma unroll
      for (int j = 0; j < kO / 4; ++j) {
        o[j * 4 + half * 2] *= factor;
        o[j * 4 + half * 2 + 1] *= factor;
      }
    }
  }
  // After the wait for a product, before its registers are read: nothing may move across.
  template <int kBegin = 0, int kEnd = kS>
  JF2_DEVICE void pin_s() {
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) ptx::pin(s[i]);
  }
  JF2_DEVICE void pin_o() {
#pragma unroll
    for (int i = 0; i < kO; ++i) ptx::pin(o[i]);
  }
  JF2_DEVICE void zero_o() {
#pragma unroll
    for (int i = 0; i < kO; ++i) o[i] = 0.f;
    pin_o();
  }
  JF2_DEVICE void pack() {
#pragma unroll
    for (int i = 0; i < kS / 2; ++i) packed[i] = pack2<Element>(s[2 * i], s[2 * i + 1]);
  }

  // The tile's log-sum-exp, to global memory; its rows' l becomes 1 / l, 0 for a row that sees
  // nothing.
  JF2_DEVICE void finish_rows(const ForwardTile& tile) {
    const Shape& shape = p.shape;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[half] += __shfl_xor_sync(~0u, l[half], 1);
      l[half] += __shfl_xor_sync(~0u, l[half], 2);
      const int row = tile.row + row_in_tile() + half * 8;
      const bool sees = row < tile.band.query_length && l[half] != 0.f;
      if ((lane & 3) == 0 && row < shape.query_len) {
        const float lse = sees ? m[half] * p.scale + __logf(l[half]) : -INFINITY;
        p.lse[(int64_t(tile.batch) * shape.query_heads + tile.head) * shape.query_len + row] = lse;
      }
      l[half] = sees ? 1.f / l[half] : 0.f;
    }
  }
  // O / l of the tile, to global memory.
  JF2_DEVICE void finish_output(const ForwardTile& tile, const float (&inverse)[2]) {
    const Shape& shape = p.shape;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Padding holds anything, NaN among it: a row that sees nothing is 0, not 0 * O.
      if (inverse[half] == 0.f) {
#pragma unroll
        for (int j = 0; j < kO / 4; ++j) o[j * 4 + half * 2] = o[j * 4 + half * 2 + 1] = 0.f;
      }
    }
    const typename Smem::Q staging = smem.o();
    const int row = warpgroup * 64 + warp * 16;
    if constexpr (kTiles.q_buffers == 2) {
      if (lane == 0) ptx::bulk_wait_read<0>();  // the last tile's O has left the buffer
      __syncwarp();
    } else {
      // O overwrites Q: every warp of the warpgroup is past its last product with it.
      ptx::barrier_sync(kWarpgroup + warpgroup, 128);
    }
#pragma unroll
    for (int j = 0; j < kO / 4; j += 2) {
      const uint32_t a = staging.address(row + (lane & 15), j * 8 + (lane >> 4) * 8);
      ptx::stmatrix_x4(a, pack2<Element>(o[j * 4] * inverse[0], o[j * 4 + 1] * inverse[0]),
                       pack2<Element>(o[j * 4 + 2] * inverse[1], o[j * 4 + 3] * inverse[1]),
                       pack2<Element>(o[j * 4 + 4] * inverse[0], o[j * 4 + 5] * inverse[0]),
                       pack2<Element>(o[j * 4 + 6] * inverse[1], o[j * 4 + 7] * inverse[1]));
    }
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
      for (int panel = 0; panel < Smem::Q::kPanels; ++panel) {
        if (panel * kPanelCols < shape.value_dim && tile.row + row < shape.query_len)
          ptx::tma_store_4d(out_map, staging.address(row, panel * kPanelCols), panel * kPanelCols,
                            tile.head, tile.row + row, tile.batch);
      }
      ptx::bulk_commit();
    }
  }
};

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

// ---- kernel -------------------------------------------------------------------------------------

// (Its argument is the head dim, not the row: nvcc 13.0 cannot name a struct-valued argument of a
// __global__ template in host code.)
template <int kHeadDim, typename Math>
__global__ void __launch_bounds__(forward_tiles(kHeadDim).threads(), 1)
    forward_kernel(const __grid_constant__ CUtensorMap q_map,
                   const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ CUtensorMap v_map,
                   const __grid_constant__ CUtensorMap out_map,
                   const __grid_constant__ ForwardParams p) {
  constexpr ForwardTiles kTiles = forward_tiles(kHeadDim);
  extern __shared__ uint8_t shared[];
  const uint32_t unaligned = ptx::shared_address(shared), base = (unaligned + 1023) & ~1023u;
  const ForwardSmem<kTiles> smem{base,
                                 reinterpret_cast<ForwardTile*>(shared + (base - unaligned) +
                                                                ForwardSmem<kTiles>::kTileRecords)};
  const int thread = threadIdx.x;
  if (thread == 0) {
    constexpr int kWarps = ForwardSmem<kTiles>::kWarps;
    for (int i = 0; i < kWarps; ++i) smem.redo()[i] = -1;
    ptx::mbarrier_init(smem.drained(), kWarps);
    for (int i = 0; i < kTiles.q_buffers; ++i) {
      ptx::mbarrier_init(smem.q_full(i), 1);
      ptx::mbarrier_init(smem.q_empty(i), kWarps);
    }
    for (int i = 0; i < kTiles.stages; ++i) {
      ptx::mbarrier_init(smem.k_full(i), 1);
      ptx::mbarrier_init(smem.k_empty(i), kWarps);
      ptx::mbarrier_init(smem.v_full(i), 1);
      ptx::mbarrier_init(smem.v_empty(i), kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers stand before anyone waits on them
  if (thread < 128) {
    ptx::setmaxnreg_dec<kTiles.producer_registers>();
    if (thread < 32) produce<kTiles>(p, smem, &q_map, &k_map, &v_map, thread);
  } else {
    ptx::setmaxnreg_inc<kTiles.consumer_registers>();
    consume<kTiles, Math>(p, smem, &out_map);
  }
}

}  // namespace jax_flash2::sm90
