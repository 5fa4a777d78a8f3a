// What a consumer warp of the sm_90a backward does with its registers: products, P and dS, and the way
// out for dK and dV. Steps as in backward.cuh.
#pragma once

#include "device/hide.cuh"
#include "device/math.cuh"
#include "kernels/sm90/backward_plan.cuh"

namespace jax_flash2::sm90 {

template <BackwardTiles kTiles, typename Math>
struct KeyWarp {
  using Smem = BackwardSmem<kTiles>;
  using Element = typename Math::Element;
  using Scores = typename Smem::Scores;
  static constexpr int kS = kTiles.block_q / 2, kD = kTiles.head_dim / 2;  // registers
  using ScoreMma = ptx::Wgmma<kTiles.block_q, Element>;
  using TermMma = ptx::Wgmma<kTiles.block_q, __nv_bfloat16>;
  using GradientMma = ptx::Wgmma<kTiles.head_dim, Element>;

  const BackwardParams& p;
  const Smem smem;
  const int thread = threadIdx.x;
  const int group = ptx::uniform(thread / 128 - 1);  // the first or second warpgroup of consumers

  float x[kS];  // S, P, dP, dS in turn; rows are keys, columns queries
  uint32_t packed_p[kS / 2], packed_ds[kS / 2];

  // Worked out wherever they are needed: held, they would cost registers that the products need.
  JF2_DEVICE int lane() const { return ptx::opaque(thread) & 31; }
  // Of the warp and of its warpgroup, in the block.
  JF2_DEVICE int first_key() const {
    return (ptx::opaque(thread) - 128) / 32 * 16 % kTiles.block_k();
  }
  JF2_DEVICE int first_key_of_group() const { return Smem::kSharesMatrices ? 0 : group * 64; }

  // Where warpgroups have keys of their own: their turns to issue products to the tensor cores, so that
  // one's exponentials and dS run under the other's products.
  JF2_DEVICE void take_turn() const { ptx::barrier_sync(kProductTurn + group, 256); }
  JF2_DEVICE void pass_turn() const { ptx::barrier_arrive(kProductTurn + (group ^ 1), 256); }

  // x = K Q^T or V dO^T of the warpgroup's keys, plus the terms of LSE or D of the queries.
  JF2_DEVICE void issue_scores(typename Smem::KV keys, typename Smem::Q queries,
                               typename Smem::Terms terms) {
    // Ones in columns 0, 1 and 2 of the 16 of k.
    constexpr uint32_t kOne = 0x3f80;
    const int t = lane() & 3;
    const uint32_t ones = t == 0 ? kOne << 16 | kOne : (t == 1 ? kOne : 0);
    const uint32_t a[4] = {ones, ones, 0, 0};
    const uint32_t k =
        ptx::opaque(keys.k_major() + Smem::KV::k_major_offset(first_key_of_group(), 0));
    const uint32_t q = ptx::opaque(queries.k_major());
    ptx::wgmma_fence();
    TermMma::template rs<true>(x, a, terms.outer_major(), 0);
#pragma unroll
    for (int d = 0; d < kTiles.head_dim; d += 16)
      ScoreMma::template ss<false, false>(x, k + Smem::KV::k_major_offset(0, d),
                                          q + Smem::Q::k_major_offset(0, d), 1);
    ptx::wgmma_commit();
  }
  // d += A B: dV += P^T dO or dK += dS^T Q.
  JF2_DEVICE void issue_gradient(float (&d)[kD], const uint32_t (&a)[kS / 2],
                                 typename Smem::Q queries) {
    const uint32_t b = ptx::opaque(queries.outer_major());
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kTiles.block_q; i += 16) {
      const uint32_t (&fragment)[4] = *reinterpret_cast<const uint32_t (*)[4]>(&a[i / 4]);
      GradientMma::template rs<true>(d, fragment, b + Smem::Q::outer_major_offset(i), 1);
    }
    ptx::wgmma_commit();
  }
  template <int kCount>
  static JF2_DEVICE void pin(float (&values)[kCount]) {
#pragma unroll
    for (float& value : values) ptx::pin(value);
  }
  static JF2_DEVICE void zero(float (&d)[kD]) {
#pragma unroll
    for (float& value : d) value = 0.f;
    pin(d);
  }

  // P or dS becomes 0 where the band hides, of the tile at query `row`.
  JF2_DEVICE void hide(const KeyBlock& block, int row) {
    const Band band = block.band;  // in one load
    const int lane = this->lane();
    const int key = block.key_block * kTiles.block_k() + first_key() + (lane >> 2);
    const int column = row + (lane & 3) * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Range rows = band.rows_of({key + half * 8, key + half * 8 + 1});
      hide_in_row<kTiles.block_q>({rows.begin - column, rows.end - column}, 0.f,
                                  [&](int j, int e) -> float& { return x[j * 4 + half * 2 + e]; });
    }
  }
  // S, less LSE, becomes P.
  JF2_DEVICE void exponentiate() {
#pragma unroll
    for (int i = 0; i < kS; ++i) x[i] = ptx::ex2(x[i] * p.scale_log2);
  }
  // dP, less D, becomes dS.
  JF2_DEVICE void score_gradients() {
#pragma unroll
    for (int i = 0; i < kS / 2; ++i) {
      const float2 pair = unpack2<Element>(packed_p[i]);
      x[2 * i] *= pair.x, x[2 * i + 1] *= pair.y;
    }
  }
  JF2_DEVICE void pack(uint32_t (&to)[kS / 2]) const {
#pragma unroll
    for (int i = 0; i < kS / 2; ++i) to[i] = pack2<Element>(x[2 * i], x[2 * i + 1]);
  }
  // Between a warp's registers and its rows of a tile: where a lane's fragments begin, and what it
  // stores and loads from there.
  template <typename Tile>
  JF2_DEVICE uint32_t fragments(Tile tile) const {
    const int lane = this->lane();
    return tile.address(first_key() + (lane & 15), (lane >> 4) * 8);
  }
  JF2_DEVICE void store(Scores tile, const uint32_t (&packed)[kS / 2]) const {
    const uint32_t to = fragments(tile);
#pragma unroll
    for (int c = 0; c < kTiles.block_q; c += 16) {
      const uint32_t* r = &packed[c / 4];
      ptx::stmatrix_x4(Scores::further(to, c), r[0], r[1], r[2], r[3]);
    }
  }
  JF2_DEVICE void store_zeros(Scores tile) const {
    const uint32_t to = fragments(tile);
#pragma unroll
    for (int c = 0; c < kTiles.block_q; c += 16)
      ptx::stmatrix_x4(Scores::further(to, c), 0, 0, 0, 0);
  }
  JF2_DEVICE void load(Scores tile, uint32_t (&packed)[kS / 2]) const {
    const uint32_t from = fragments(tile);
#pragma unroll
    for (int c = 0; c < kTiles.block_q; c += 16) {
      uint32_t (&r)[4] = *reinterpret_cast<uint32_t (*)[4]>(&packed[c / 4]);
      ptx::ldmatrix_x4(r, Scores::further(from, c));
    }
  }
  JF2_DEVICE void arrive(uint32_t barrier) const {
    __syncwarp();
    if (lane() == 0) ptx::mbarrier_arrive(barrier);
  }

  // Query tiles at the block's beginning that see no key of the warpgroup.
  JF2_DEVICE int hidden_tiles(const KeyBlock& block) const {
    const int key = block.key_block * kTiles.block_k() + first_key_of_group();
    const int row = block.band.rows_of({key, key + 64}).begin;
    return ptx::uniform(max(row - block.first_row, 0) / kTiles.block_q);
  }
  // Zeroes rows of a tile outside `live`, which counts from its first row.
  template <typename Tile>
  JF2_DEVICE void clear_rows(Tile tile, Range live) const {
    constexpr int kChunks = Tile::kPanels * 8;
#pragma unroll 1
    for (int i = ptx::opaque(thread) - 128; i < Tile::kRows * kChunks; i += 256) {
      const int row = i / kChunks;
      if (row >= live.begin && row < live.end) continue;
      const uint32_t a = tile.address(row, i % kChunks * 8);
      ptx::sts_f32x2(a, 0.f, 0.f);
      ptx::sts_f32x2(a + 8, 0.f, 0.f);
    }
  }
  static JF2_DEVICE void cleared() {
    ptx::fence_proxy_async();
    ptx::barrier_sync(kConsumers, 256);
  }
  // Padding may hold anything, NaN among it: before products with a step's tiles, or a block's.
  JF2_DEVICE void clear_padding(const KeyBlock& block, int row, int stage) const {
    const Range live = {block.rows.begin - row, block.rows.end - row};
    if (live.begin <= 0 && (live.end >= kTiles.block_q || block.rows.end == p.shape.query_len))
      return;
    clear_rows(smem.q(stage), live);
    clear_rows(smem.dout(stage), live);
    cleared();
  }
  JF2_DEVICE void clear_padding(const KeyBlock& block,
                                const RingPlace<KeyBlock::kSlots>& record) const {
    const int key = block.key_block * kTiles.block_k();
    const Range live = {block.keys.begin - key, block.keys.end - key};
    if (live.begin <= 0 && (live.end >= kTiles.block_k() || block.keys.end == p.shape.kv_len))
      return;
    ptx::mbarrier_wait(smem.v_full(record.slot()), record.parity());
    clear_rows(smem.k(record.slot()), live);
    clear_rows(smem.v(record.slot()), live);
    cleared();
  }

  // Where the rows of a gradient go: dK or dV, [B, S, K, cols], or its part of dkv_partial.
  struct Target {
    void* data;
    float scale;
    int cols;
    int first_col;  // in dkv_partial
  };
  // The warp's 16 rows of a gradient to global memory, 0 for keys that nobody sees: a panel after the
  // other through the warp's own rows of `staging`, from registers into whole lines.
  template <typename Staging>
  JF2_DEVICE void store_gradient(const KeyBlock& block, float (&d)[kD], const Target& target,
                                 Staging staging) {
    const int lane = this->lane(), first_key = this->first_key();
    const int key = block.key_block * kTiles.block_k() + first_key;
    const Range keys = block.keys;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = key + (lane >> 2) + half * 8;
      if (row >= keys.begin && row < keys.end) continue;
#pragma unroll
      for (int j = 0; j < kD / 4; ++j) d[j * 4 + half * 2] = d[j * 4 + half * 2 + 1] = 0.f;
    }
    if (p.dkv_partial != nullptr) return store_partial(block, d, target);
    // Of a panel, a lane takes 16 bytes of every fourth row.
    const int row = lane / 8, col = lane % 8 * 8;
    const int rows = p.shape.kv_len - key - row;
    const int64_t stride = int64_t(p.shape.kv_heads) * target.cols;
    Element* const to = static_cast<Element*>(target.data) + block.kv_head * target.cols + col +
                        (int64_t(block.batch) * p.shape.kv_len + key + row) * stride;
    const uint32_t in = fragments(staging), out = staging.address(first_key + row, col);
#pragma unroll
    for (int panel = 0; panel < Smem::KV::kPanels; ++panel) {
      __syncwarp();  // the panel before has been read
#pragma unroll
      for (int c = 0; c < kPanelCols; c += 16) {
        if (panel * kPanelCols + c >= kTiles.head_dim) break;
        uint32_t r[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const pair = &d[(panel * kPanelCols + c) / 2 + i * 2];
          r[i] = pack2<Element>(pair[0] * target.scale, pair[1] * target.scale);
        }
        ptx::stmatrix_x4(Staging::further(in, c), r[0], r[1], r[2], r[3]);
      }
      __syncwarp();  // the panel is there
      const bool live = panel * kPanelCols + col < target.cols;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 chunk = ptx::lds_128((out ^ (i % 2 * 64)) + i * 4 * kPanelRowBytes);
        if (live && i * 4 < rows)
          *reinterpret_cast<uint4*>(to + i * 4 * stride + panel * kPanelCols) = chunk;
      }
    }
  }
  // The same in float32, where several thread blocks have a part of a group.
  JF2_DEVICE void store_partial(const KeyBlock& block, const float (&d)[kD],
                                const Target& target) const {
    const int lane = this->lane();
    const int64_t all = p.shape.head_dim + p.shape.value_dim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = block.key_block * kTiles.block_k() + first_key() + (lane >> 2) + half * 8;
      if (key >= p.shape.kv_len) break;
      const int64_t share = int64_t(block.batch) * p.group_splits + block.split;
      const int64_t row = (share * p.shape.kv_len + key) * p.shape.kv_heads + block.kv_head;
      float* const to = p.dkv_partial + row * all + target.first_col;
#pragma unroll
      for (int j = 0; j < kD / 4; ++j) {
        const int col = j * 8 + (lane & 3) * 2;
        if (col >= target.cols) break;
        *reinterpret_cast<float2*>(to + col) =
            make_float2(d[j * 4 + half * 2] * target.scale, d[j * 4 + half * 2 + 1] * target.scale);
      }
    }
  }
};

}  // namespace jax_flash2::sm90
