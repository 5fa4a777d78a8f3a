// One consumer warp's share of a query tile in registers: products, softmax, output. Steps as in
// forward.cuh.
#pragma once

#include "device/hide.cuh"
#include "kernels/sm90/forward_plan.cuh"

namespace jax_flash2::sm90 {

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
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(tile.row + row_in_tile() + half * 8, tile.band.query_length - 1);
      hide_in_row<kTiles.block_k>(seen_by(tile.band, row, key, lane), -INFINITY,
                                  [&](int j, int e) -> float& { return s[j * 4 + half * 2 + e]; });
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

}  // namespace jax_flash2::sm90
