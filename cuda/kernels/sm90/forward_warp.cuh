// One consumer warp's share of a query tile in registers: products, softmax, output. Steps as in
// forward.cuh.
#pragma once

#include "device/hide.cuh"
#include "device/softmax.cuh"
#include "device/store_rows.cuh"
#include "kernels/sm90/forward_plan.cuh"

namespace jax_flash2::sm90 {

inline constexpr int kTurn = 1;  // named barriers of the turns, + warpgroup

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

  // A thread's share of l beyond which the stale maximum is not trusted: as much as one P, as an
  // element, and O, as float32s, certainly hold.
  static constexpr float kStaleLimit = kLargest<Element> < 1e5f ? kLargest<Element> : 1e12f;

  float s[kS], o[kO];
  uint32_t packed[kTiles.block_k / 4];
  // Of rows g and g + 8: the maximum of scale_log2 S, and the sum of P over this thread's columns.
  float m[2], l[2];

  JF2_DEVICE int row_in_tile() const { return warpgroup * 64 + warp * 16 + (lane >> 2); }

  // Operands in shared memory, each hidden from a compiler that would keep every step's in a
  // register.
  JF2_DEVICE uint32_t q_operand(int slot) const {
    return ptx::opaque(smem.q(0).k_major() + (slot * Smem::Q::kBytes >> 4) +
                       Smem::Q::k_major_offset(warpgroup * 64, 0));
  }
  JF2_DEVICE uint32_t k_operand(int slot) const {
    return ptx::opaque(smem.k(0).k_major() + (slot * Smem::KV::kBytes >> 4));
  }
  JF2_DEVICE uint32_t v_operand(int slot) const {
    return ptx::opaque(smem.v(0).outer_major() + (slot * Smem::KV::kBytes >> 4));
  }
  JF2_DEVICE void issue_qk(uint32_t q, uint32_t k) {
#pragma unroll
    for (int d = 0; d < kTiles.head_dim; d += 16)
      QkMma::template ss<false, false>(s, q + Smem::Q::k_major_offset(0, d),
                                       k + Smem::KV::k_major_offset(0, d), d > 0);
    ptx::wgmma_commit();
  }
  // `accumulate` 0: what O held is forgotten.
  JF2_DEVICE void issue_pv(uint32_t v, int accumulate) {
#pragma unroll
    for (int k = 0; k < kTiles.block_k; k += 16) {
      const uint32_t (&a)[4] = *reinterpret_cast<const uint32_t (*)[4]>(&packed[k / 4]);
      PvMma::template rs<true>(o, a, v + Smem::KV::outer_major_offset(k), k > 0 || accumulate);
    }
    ptx::wgmma_commit();
  }

  // Hides what the band hides of the block of keys at `key`: one side at a time, since most blocks
  // that are cut are cut on one.
  JF2_DEVICE void mask(const ForwardTile& tile, int key) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = p.token(tile.row + row_in_tile() + half * 8);
      const Range seen = seen_by(tile.band, min(token, tile.band.query_length - 1), key, lane);
      const auto at = [&](int j, int e) -> float& { return s[j * 4 + half * 2 + e]; };
      if (seen.end < kTiles.block_k)
        hide_in_row<kTiles.block_k>({INT32_MIN, seen.end}, -INFINITY, at);
      if (seen.begin > 0) hide_in_row<kTiles.block_k>({seen.begin, INT32_MAX}, -INFINITY, at);
    }
  }
  JF2_DEVICE float row_max(int half) const {
    float x = fmaxf(s[half * 2], s[half * 2 + 1]);
#pragma unroll
    for (int j = 1; j < kS / 4; ++j)
      x = fmaxf(x, fmaxf(s[j * 4 + half * 2], s[j * 4 + half * 2 + 1]));
    return quad_max(x);
  }
  // s -> P = 2^(scale_log2 s - m) for the score registers [kBegin, kEnd), added to l.
  template <int kBegin, int kEnd>
  JF2_DEVICE void exponentiate() {
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      const int half = (i >> 1) & 1;
      s[i] = ptx::ex2(fmaf(s[i], p.scale_log2, -m[half]));
      l[half] += s[i];
    }
  }
  // S -> P of a tile's first block. A row that sees nothing yet starts far below any score.
  JF2_DEVICE void open_rows() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      m[half] = fmaxf(row_max(half) * p.scale_log2, -1e30f);
      l[half] = 0.f;
    }
    exponentiate<0, kS>();
  }
  // Moves O and l to the maximum `top`, where it has grown.
  JF2_DEVICE void rescale(const float (&top)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = ptx::ex2(m[half] - top[half]);
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
  JF2_DEVICE void pin_s() {
#pragma unroll
    for (int i = 0; i < kS; ++i) ptx::pin(s[i]);
  }
  JF2_DEVICE void pin_o() {
#pragma unroll
    for (int i = 0; i < kO; ++i) ptx::pin(o[i]);
  }
  JF2_DEVICE void pack() {
#pragma unroll
    for (int i = 0; i < kS / 2; ++i) packed[i] = pack2<Element>(s[2 * i], s[2 * i + 1]);
  }

  // Log-sum-exp and 1 / l of rows g and g + 8; -inf and 0 for a row that sees nothing.
  struct Rows {
    float lse[2], inverse[2];
  };
  JF2_DEVICE Rows finish_rows(const ForwardTile& tile) const {
    Rows rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(l[half]);
      const int token = p.token(tile.row + row_in_tile() + half * 8);
      const bool sees = token < tile.band.query_length && sum != 0.f;
      rows.lse[half] = sees ? log_sum_exp(m[half], sum) : -INFINITY;
      rows.inverse[half] = sees ? ptx::rcp(sum) : 0.f;
    }
    return rows;
  }
  // O / l and the log-sum-exp of the tile, to global memory. The latter last: a fence before the
  // copy engine's turn would wait for it.
  JF2_DEVICE void store_output(const ForwardTile& tile, const Rows& rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Padding holds anything, NaN among it: a row that sees nothing is 0, not 0 * O.
      if (rows.inverse[half] == 0.f) {
#pragma unroll
        for (int j = 0; j < kO / 4; ++j) o[j * 4 + half * 2] = o[j * 4 + half * 2 + 1] = 0.f;
      }
    }
    if constexpr (kTiles.q_buffers == 2) {
      store_by_copy_engine(tile, rows.inverse);
    } else {
      store_from_registers(tile, rows.inverse);
    }
    const Shape& shape = p.shape;
    const int row = tile.row + row_in_tile(), token = p.token(row), step = p.eighth_token();
    const int64_t head = int64_t(tile.batch) * shape.query_heads + tile.head + p.head_in_pack(row);
    float* const lse = p.lse + head * shape.query_len + token;
    if ((lane & 3) == 0) {
      if (token < shape.query_len) lse[0] = rows.lse[0];
      if (token + step < shape.query_len) lse[step] = rows.lse[1];
    }
  }

 private:
  // Rows g and g + 8 of column pair j, ready to be stored.
  JF2_DEVICE uint32_t output(int j, int half, const float (&inverse)[2]) const {
    return pack2<Element>(o[j * 4 + half * 2] * inverse[half],
                          o[j * 4 + half * 2 + 1] * inverse[half]);
  }
  JF2_DEVICE void store_by_copy_engine(const ForwardTile& tile, const float (&inverse)[2]) {
    const typename Smem::Q staging = smem.o();
    const int row = warpgroup * 64 + warp * 16;
    // The last tile's O has left the buffer; where this one is done again, it has arrived, too.
    if (lane == 0) {
      ptx::bulk_wait_read<0>();
      if (tile.looks) ptx::bulk_wait<0>();
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kO / 4; j += 2)
      ptx::stmatrix_x4(staging.address(row + (lane & 15), j * 8 + (lane >> 4) * 8),
                       output(j, 0, inverse), output(j, 1, inverse), output(j + 1, 0, inverse),
                       output(j + 1, 1, inverse));
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
      for (int panel = 0; panel < Smem::Q::kPanels; ++panel) {
        if (panel * kPanelCols < p.shape.value_dim && tile.row + row < p.rows())
          ptx::tma_store_4d(out_map, staging.address(row, panel * kPanelCols), panel * kPanelCols,
                            tile.head, p.token(tile.row + row), tile.batch);
      }
      ptx::bulk_commit();
    }
  }
  JF2_DEVICE void store_from_registers(const ForwardTile& tile, const float (&inverse)[2]) {
    const Shape& shape = p.shape;
    const int row = tile.row + row_in_tile(), width = shape.query_heads * shape.value_dim;
    Element* const out = static_cast<Element*>(p.out) +
                         (int64_t(tile.batch) * shape.query_len + p.token(row)) * width +
                         (tile.head + p.head_in_pack(row)) * shape.value_dim;
    // The rows of one head in a pack stand for rows that are as much closer to each other.
    store_rows<kO / 4>(out, width >> p.pack_log2, p.rows() - row, shape.value_dim, lane,
                       [&](int j, int half) { return output(j, half, inverse); });
  }
};

}  // namespace jax_flash2::sm90
