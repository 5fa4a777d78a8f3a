// The forward for sm_80 and newer: FlashAttention-2 on mma.sync, cp.async and ldmatrix.
//
// One thread block owns `block_q` query rows of one head; its warps split the rows, never the keys,
// so that no warp waits for another's scores. Step numbers as in cuda/README.md:
//   1  choose the rows (longest first), ask the band for the range of keys that they see
//   2  start loading Q and the last K tile
//   For every tile of keys, right to left, so that the partly hidden ones come first:
//   3  wait for K(j), start loading V(j)
//   4  S = Q K^T
//   5  where the band does not cover the tile: hidden elements of S become -inf
//   6  wait for V(j), start loading K(j - 1)
//   7  online softmax: new row maximum m, P = 2^(scale S - m), O and l brought to the new m
//   8  O += P V, with P taken from registers
//   9  O / l through shared memory to global memory; LSE = m + log l. A row that sees nothing: 0,
//   -inf
// With two stages, 3 waits for K(j) and V(j) both and starts K(j - 1) and V(j - 1); there is no 6.
#pragma once

#include "core/problem.h"
#include "device/copy.cuh"
#include "device/hide.cuh"
#include "device/softmax.cuh"
#include "kernels/sm80/tiles_forward.h"

namespace jax_flash2::sm80 {

// What the launcher derives from a problem.
struct ForwardPlan {
  int query_blocks;  // a head's
  // Heads (over all sequences) that run side by side, the longest rows of each first.
  int section;
  float scale_log2;  // scale * log2(e)
};

// What a kernel is compiled for. A type, since nvcc 13.0 cannot launch a kernel template that takes
// the row itself as its argument.
template <typename Math_, int kHeadDim>
struct ForwardConfig {
  using Math = Math_;
  static constexpr ForwardTile kTile = sizeof(typename Math::Element) == 2
                                           ? find_tile(kForwardTiles16, kHeadDim)
                                           : find_tile(kForwardTiles32, kHeadDim);
  static_assert(kTile.head_dim == kHeadDim, "tiles_forward.h lacks a row for this head dim");
};

template <typename Config>
struct ForwardShared {
  static constexpr ForwardTile kTile = Config::kTile;
  using Element = typename Config::Math::Element;
  using QTile = SmemTile<Element, kTile.block_q, kTile.head_dim>;  // also O's on its way out
  using KvTile = SmemTile<Element, kTile.block_k, kTile.head_dim>;
  static constexpr int kBytes = QTile::kBytes + 2 * kTile.stages * KvTile::kBytes;
  static_assert(kBytes <= 99 * 1024, "sm_86 and sm_89 give a block 99 KB");
  static_assert(QTile::kBytes % 1024 == 0 && KvTile::kBytes % 1024 == 0,
                "the swizzle wants every tile aligned to 1024 bytes");

  uint32_t base;
  JF2_DEVICE QTile q() const { return {base}; }
  JF2_DEVICE KvTile k(int stage) const {
    return {base + QTile::kBytes + stage * 2 * KvTile::kBytes};
  }
  JF2_DEVICE KvTile v(int stage) const { return {k(stage).base + KvTile::kBytes}; }
};

// The rows and the head of a thread block.
struct ForwardWork {
  int query_block, head;
  int64_t sequence;

  JF2_DEVICE ForwardWork(const ForwardPlan& plan, const Shape& shape, unsigned block) {
    const unsigned heads = unsigned(shape.batch) * shape.query_heads;  // fits: the grid does
    const unsigned first = block / (plan.section * plan.query_blocks) * plan.section;
    const unsigned width = min(unsigned(plan.section), heads - first);
    const unsigned rest = block - first * plan.query_blocks;
    query_block = plan.query_blocks - 1 - int(rest / width);
    const unsigned flat_head = first + rest % width;
    sequence = flat_head / shape.query_heads;
    head = int(flat_head % shape.query_heads);
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kTile.warps * 32, Config::kTile.blocks_per_sm)
    forward_kernel(const __grid_constant__ ForwardProblem problem,
                   const __grid_constant__ ForwardPlan plan) {
  using Math = typename Config::Math;
  using Element = typename Math::Element;
  using Shared = ForwardShared<Config>;
  constexpr ForwardTile kTile = Config::kTile;
  constexpr int kThreads = kTile.warps * 32, kBlockK = kTile.block_k;
  constexpr int kM = kTile.block_q / kTile.warps;  // rows of a warp
  static_assert(kM % 16 == 0, "a warp's rows are whole pieces of mma.sync");
  static_assert(kTile.stages == 1 || kTile.stages == 2, "the schedule knows one and two stages");

  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  const Shared shared = {ptx::shared_address(dynamic_shared)};
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;

  // 1
  const Shape& shape = problem.shape;
  const ForwardWork work(plan, shape, blockIdx.x);
  const Band band = problem.band.at(work.sequence, shape.query_len, shape.kv_len);
  const int row0 = work.query_block * kTile.block_q, warp_row = warp * kM;
  const Range rows = {row0, min(row0 + kTile.block_q, band.query_length)};
  const Range keys = band.keys_of(rows);
  const int first_tile = keys.begin / kBlockK, end_tile = (keys.end + kBlockK - 1) / kBlockK;

  const int64_t q_stride = int64_t(shape.query_heads) * shape.head_dim;
  const int64_t k_stride = int64_t(shape.kv_heads) * shape.head_dim;
  const int64_t v_stride = int64_t(shape.kv_heads) * shape.value_dim;
  const int64_t o_stride = int64_t(shape.query_heads) * shape.value_dim;
  const int64_t first_row = work.sequence * shape.query_len,
                first_key = work.sequence * shape.kv_len;
  const int kv_head = work.head / shape.group();
  const GlobalMatrix<const Element> q = {
      static_cast<const Element*>(problem.q) + first_row * q_stride + work.head * shape.head_dim,
      q_stride, shape.head_dim};
  const GlobalMatrix<const Element> k = {
      static_cast<const Element*>(problem.k) + first_key * k_stride + kv_head * shape.head_dim,
      k_stride, shape.head_dim};
  const GlobalMatrix<const Element> v = {
      static_cast<const Element*>(problem.v) + first_key * v_stride + kv_head * shape.value_dim,
      v_stride, shape.value_dim};
  using QTile = typename Shared::QTile;
  using KvTile = typename Shared::KvTile;
  const int last_key = (end_tile - 1) * kBlockK;
  TileReader<kThreads, KvTile> k_reader(k, last_key, thread), v_reader(v, last_key, thread);

  // 2
  if (first_tile < end_tile) {
    load_tile<kThreads>(shared.q(), q, row0, rows, thread);
    k_reader.load(shared.k((end_tile - 1) % kTile.stages), keys);
    if constexpr (kTile.stages == 2) v_reader.load(shared.v((end_tile - 1) % kTile.stages), keys);
    ptx::cp_async_commit();
  }

  const OperandA<Math, QTile, Major::kKMajor> q_shared(shared.q(), warp_row, 0, lane);
  RegisterOperandA<Math, kM, kTile.head_dim> q_registers;

  OnlineSoftmax<kM> softmax;
  Accumulators<kM, kTile.head_dim> o;
  o.zero();
  for (int tile = end_tile - 1; tile >= first_tile; --tile) {
    // 3: K(j) has landed for every thread, and no warp reads V(j + 1) any more.
    ptx::cp_async_wait<0>();
    __syncthreads();
    if constexpr (kTile.stages == 1) {
      v_reader.load(shared.v(0), keys);
      v_reader.move(-kBlockK);
    } else if (tile > first_tile) {
      k_reader.move(-kBlockK);
      v_reader.move(-kBlockK);
      k_reader.load(shared.k((tile - 1) % 2), keys);
      v_reader.load(shared.v((tile - 1) % 2), keys);
    }
    ptx::cp_async_commit();
    if constexpr (kTile.q_in_registers) {
      if (tile == end_tile - 1) q_registers.fill(q_shared);
    }

    // 4
    Accumulators<kM, kBlockK> s;
    s.zero();
    const OperandB<Math, KvTile, Major::kKMajor> k_shared(shared.k(tile % kTile.stages), 0, 0,
                                                          lane);
    if constexpr (kTile.q_in_registers) {
      gemm<kTile.head_dim>(s, q_registers, k_shared);
    } else {
      gemm<kTile.head_dim>(s, q_shared, k_shared);
    }

    // 5: one loop for covered and partly hidden tiles, since a uniform branch costs nothing beside
    // them.
    const Range tile_keys = {tile * kBlockK, (tile + 1) * kBlockK};
    if (!band.covers(rows, tile_keys)) {
      hide(s, band, row0 + warp_row, tile_keys.begin, -INFINITY, lane);
    }

    if constexpr (kTile.stages == 1) {
      // 6: V(j) has landed for every thread, and no warp reads K(j) any more.
      ptx::cp_async_wait<0>();
      __syncthreads();
      k_reader.move(-kBlockK);
      if (tile > first_tile) k_reader.load(shared.k(0), keys);
      ptx::cp_async_commit();
    }

    // 7, 8
    softmax.template step<kTile.max_lag>(s, o, plan.scale_log2);
    const OperandB<Math, KvTile, Major::kOuterMajor> v_shared(shared.v(tile % kTile.stages), 0, 0,
                                                              lane);
    gemm_from_accumulators<Math>(o, s, v_shared);
  }

  // 9: a warp reads and writes its own rows of the Q tile alone, so that no block-wide barrier is
  // needed.
  softmax.finish();
  float* const lse = static_cast<float*>(problem.lse) +
                     (work.sequence * shape.query_heads + work.head) * shape.query_len;
#pragma unroll
  for (int r = 0; r < kM / 8; ++r) {
    const int i = row0 + warp_row + r * 8 + (lane >> 2);
    const bool sees = i < band.query_length && softmax.sum(r) != 0.f;  // NaN is not 0
    const float inverse = 1.f / softmax.sum(r);
#pragma unroll
    for (int j = 0; j < kTile.head_dim / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = at(o, r, j, e);
        x = sees ? x * inverse : 0.f;
      }
    }
    if (lane % 4 == 0 && i < shape.query_len) lse[i] = sees ? softmax.log_sum_exp(r) : -INFINITY;
  }
  store_accumulators(shared.q(), warp_row, 0, o, 1.f, lane);
  __syncwarp();
  const GlobalMatrix<Element> out = {
      static_cast<Element*>(problem.out) + first_row * o_stride + work.head * shape.value_dim,
      o_stride, shape.value_dim};
  store_rows<32, kM>(out, shared.q(), warp_row, row0 + warp_row, {0, shape.query_len}, lane);
}

}  // namespace jax_flash2::sm80
