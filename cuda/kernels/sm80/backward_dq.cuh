// dQ of the backward's split mode, for sm_80 and newer: no atomics, no workspace.
//
// Walks as the forward does: one thread block owns `block_q` query rows of one head, its warps
// split the rows, and dS goes from the accumulators of one product straight into the next.
//   1  choose the rows, ask the band for the range of keys that they see; load Q, dO, K and V
//   For every tile of keys:
//   2  wait for K and V; with two stages, start loading the next ones
//   3  S = Q K^T, P = exp(scale S - LSE), hidden elements of P become 0
//   4  dP = dO V^T, dS = P (dP - D)
//   5  dQ += dS K; with one stage, start loading the next K and V
//   6  scale dQ through shared memory to global memory. A row that sees nothing: 0
#pragma once

#include "kernels/sm80/backward_common.cuh"

namespace jax_flash2::sm80 {

// As BackwardConfig; the tile fits every device.
template <typename Math_, int kHeadDim>
struct DqConfig {
  using Math = Math_;
  static constexpr DqTile kTile =
      dq_tile(kHeadDim, int(sizeof(typename Math::Element)), kSharedClasses[2]);
};

template <typename Config>
struct DqShared {
  static constexpr DqTile kTile = Config::kTile;
  using Element = typename Config::Math::Element;
  using QTile = SmemTile<Element, kTile.block_q, kTile.head_dim>;  // Q, also dQ on its way out; dO
  using KvTile = SmemTile<Element, kTile.block_k, kTile.head_dim>;
  static constexpr int kBytes = 2 * QTile::kBytes + kTile.stages * 2 * KvTile::kBytes;
  static_assert(kBytes == shared_bytes(kTile, sizeof(Element)) && kBytes <= 99 * 1024,
                "sm_86 and sm_89 give a block 99 KB");
  static_assert(QTile::kBytes % 1024 == 0 && KvTile::kBytes % 1024 == 0,
                "the swizzle wants every tile aligned to 1024 bytes");

  uint32_t base;
  JF2_DEVICE QTile q() const { return {base}; }
  JF2_DEVICE QTile dout() const { return {base + QTile::kBytes}; }
  JF2_DEVICE KvTile k(int stage) const {
    return {base + 2 * QTile::kBytes + stage * 2 * KvTile::kBytes};
  }
  JF2_DEVICE KvTile v(int stage) const { return {k(stage).base + KvTile::kBytes}; }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kTile.warps * 32, Config::kTile.blocks_per_sm)
    backward_dq_kernel(const __grid_constant__ BackwardProblem problem,
                       const __grid_constant__ BackwardPlan plan) {
  using Math = typename Config::Math;
  using Element = typename Math::Element;
  constexpr DqTile kTile = Config::kTile;
  using Shared = DqShared<Config>;
  using QTile = typename Shared::QTile;
  using KvTile = typename Shared::KvTile;
  constexpr int kThreads = kTile.warps * 32, kBlockK = kTile.block_k, kHeadDim = kTile.head_dim;
  constexpr int kM = kTile.block_q / kTile.warps;  // rows of a warp
  static_assert(kM % 16 == 0, "a warp's rows are whole pieces of mma.sync");

  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  const Shared shared = {ptx::shared_address(dynamic_shared)};
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;

  // 1: where the mask is causal the last rows see the most keys, and go first.
  const Shape& shape = problem.shape;
  const BackwardWork work(plan, shape.query_heads, shape.batch, blockIdx.x);
  const Band band = problem.band.at(work.sequence, shape.query_len, shape.kv_len);
  const int row0 = (plan.blocks - 1 - work.block) * kTile.block_q, warp_row = warp * kM;
  const Range tile_rows = {row0, row0 + kTile.block_q};
  const Range rows = {row0, min(tile_rows.end, band.query_length)};
  const Range keys = band.keys_of(rows);
  const int first_tile = keys.begin / kBlockK, end_tile = (keys.end + kBlockK - 1) / kBlockK;

  const int kv_head = work.head / shape.group();
  const auto load_kv = [&](int stage, int tile) {
    load_tile<kThreads>(shared.k(stage),
                        head_matrix<const Element>(problem.k, work.sequence, shape.kv_len,
                                                   shape.kv_heads, kv_head, shape.head_dim),
                        tile * kBlockK, keys, thread);
    load_tile<kThreads>(shared.v(stage),
                        head_matrix<const Element>(problem.v, work.sequence, shape.kv_len,
                                                   shape.kv_heads, kv_head, shape.value_dim),
                        tile * kBlockK, keys, thread);
    ptx::cp_async_commit();
  };
  if (first_tile < end_tile) {
    load_tile<kThreads>(shared.q(),
                        head_matrix<const Element>(problem.q, work.sequence, shape.query_len,
                                                   shape.query_heads, work.head, shape.head_dim),
                        row0, rows, thread);
    load_tile<kThreads>(shared.dout(),
                        head_matrix<const Element>(problem.dout, work.sequence, shape.query_len,
                                                   shape.query_heads, work.head, shape.value_dim),
                        row0, rows, thread);
    load_kv(0, first_tile);
  }

  // Workspaces are padded to whole tiles: every row may be read.
  float lse[kM / 8], delta[kM / 8];
  const int64_t padded_len = round_up(shape.query_len, kTokenTile);
  const float* const stats =
      static_cast<const float*>(problem.row_stats) +
      (int64_t(work.sequence) * shape.query_heads + work.head) * kRowStats * padded_len + row0 +
      warp_row + (lane >> 2);
#pragma unroll
  for (int r = 0; r < kM / 8; ++r) {
    lse[r] = stats[kScaledLse * padded_len + r * 8];
    delta[r] = stats[kDelta * padded_len + r * 8];
  }

  const OperandA<Math, QTile, Major::kKMajor> q(shared.q(), warp_row, 0, lane);
  const OperandA<Math, QTile, Major::kKMajor> dout(shared.dout(), warp_row, 0, lane);
  Accumulators<kM, kHeadDim> dq;
  dq.zero();
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int stage = kTile.stages == 2 ? (tile - first_tile) % 2 : 0;
    // 2: K and V have landed for every thread, and no warp reads those of the last step any more.
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (kTile.stages == 2 && tile + 1 < end_tile) load_kv(stage ^ 1, tile + 1);

    // 3
    const Range tile_keys = {tile * kBlockK, (tile + 1) * kBlockK};
    const bool masked = !band.covers(tile_rows, tile_keys);
    Accumulators<kM, kBlockK> p, ds;
    p.zero();
    gemm<kHeadDim>(p, q, OperandB<Math, KvTile, Major::kKMajor>(shared.k(stage), 0, 0, lane));
    probabilities(p, lse, plan.scale_log2);
    if (masked) hide(p, band, row0 + warp_row, tile_keys.begin, 0.f, lane);

    // 4
    ds.zero();
    gemm<kHeadDim>(ds, dout, OperandB<Math, KvTile, Major::kKMajor>(shared.v(stage), 0, 0, lane));
    score_gradients(ds, p, delta);
    if (masked) hide_gradients(ds, p);

    // 5
    gemm_from_accumulators<Math>(
        dq, ds, OperandB<Math, KvTile, Major::kOuterMajor>(shared.k(stage), 0, 0, lane));
    if (kTile.stages == 1 && tile + 1 < end_tile) {
      __syncthreads();  // no warp reads K or V any more
      load_kv(0, tile + 1);
    }
  }

  // 6: a warp reads and writes its own rows of the Q tile alone, so that no block-wide barrier is
  // needed.
#pragma unroll
  for (int r = 0; r < kM / 8; ++r) {
    if (lse[r] != INFINITY) continue;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) at(dq, r, j, 0) = at(dq, r, j, 1) = 0.f;
  }
  __syncwarp();  // the other lanes have read their fragments of Q
  store_accumulators(shared.q(), warp_row, 0, dq, plan.scale, lane);
  __syncwarp();
  store_rows<32, kM>(head_matrix<Element>(problem.dq, work.sequence, shape.query_len,
                                          shape.query_heads, work.head, shape.head_dim),
                     shared.q(), warp_row, row0 + warp_row, {0, shape.query_len}, lane);
}

}  // namespace jax_flash2::sm80
