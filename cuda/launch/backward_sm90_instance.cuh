// The sm_90a backward of one head-dim template: its key blocks, with dQ fused or in a kernel of its own.
// Compiled for sm_90a alone.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/sm90/backward.cuh"
#include "kernels/sm90/split_dq.cuh"
#include "launch/backward.h"
#include "launch/tensor_map.h"
#include "launch/tile_order.h"

namespace jax_flash2::gpu {

// Out of order, full attention goes head by head. Under a causal mask the first blocks have the most to do
// and go first, over so many heads at once that the blocks of a head stay abreast of each other, on queries
// that are still in L2: a block begins at its diagonal, so the next one of its head should begin when it is
// a block further. While a block works through its rows, all of the `running` start once. Measured, twice
// as many heads are better, but for heads of few blocks.
//
// In a fixed order, a block that begins when the one before is two blocks of rows ahead never waits for it;
// from diagonals, half a block does. More heads at once would leave L2.
inline sm90::BlockOrder block_order(const BackwardProblem& problem, int block_k, int64_t running) {
  const Shape& s = problem.shape;
  const int heads = static_cast<int>(s.batch * s.kv_heads * problem.group_splits);
  const int key_blocks = static_cast<int>(round_up(s.kv_len, block_k) / block_k);
  const bool fixed = problem.semaphores != nullptr, full = problem.band.upper >= kUnbounded;
  if (full && !fixed) return {key_blocks, heads, 1, false};
  double rows = s.query_len / (full ? 1.0 : 2.0);  // of a block, about
  if (problem.band.lower > -kUnbounded)
    rows = std::min(rows, double(problem.band.upper) - problem.band.lower + block_k);
  double apart = key_blocks < 16 ? 1 : 2;  // blocks of rows
  if (fixed) {
    rows *= s.group() / problem.group_splits;
    apart = full ? 2 : 0.5;
  }
  const double abreast = apart * running * block_k / std::max(rows, 1.0);
  const int section = static_cast<int>(std::clamp(std::round(abreast), 1.0, double(heads)));
  return {key_blocks, heads, section, fixed};
}

// Tensor maps in boxes of so many queries and keys.
inline Status encode_operands(const BackwardProblem& problem, int query_rows, int key_rows,
                              CUtensorMap& q, CUtensorMap& k, CUtensorMap& v, CUtensorMap& dout) {
  const Shape& s = problem.shape;
  struct Operand {
    CUtensorMap& map;
    const void* data;
    int rows, heads, cols, box_rows;
  };
  const Operand operands[] = {
      {q, problem.q, s.query_len, s.query_heads, s.head_dim, query_rows},
      {dout, problem.dout, s.query_len, s.query_heads, s.value_dim, query_rows},
      {k, problem.k, s.kv_len, s.kv_heads, s.head_dim, key_rows},
      {v, problem.v, s.kv_len, s.kv_heads, s.value_dim, key_rows},
  };
  for (const Operand& o : operands) {
    Status e = encode_tensor_map(
        {o.data, problem.dtype, s.batch, o.rows, o.heads, o.cols, o.box_rows}, o.map);
    if (!e.ok()) return e;
  }
  return {};
}

template <int kHeadDim, bool kHasDq>
Status launch_key_blocks(const BackwardProblem& problem, cudaStream_t stream) {
  static constexpr sm90::BackwardTiles kTiles = sm90::backward_tiles(kHeadDim);
  static_assert(kTiles.head_dim == kHeadDim, "no row for this head dim in tiles_backward.h");
  const Shape& s = problem.shape;
  CUtensorMap q_map, k_map, v_map, dout_map;
  if (Status e =
          encode_operands(problem, kTiles.block_q, kTiles.block_k(), q_map, k_map, v_map, dout_map);
      !e.ok())
    return e;
  const int64_t key_blocks = s.batch * s.kv_heads * problem.group_splits *
                             (round_up(s.kv_len, kTiles.block_k()) / kTiles.block_k());
  int64_t blocks = 0;
  if (Status e = persistent_blocks(key_blocks, blocks); !e.ok()) return e;
  const sm90::BackwardParams params = {
      .shape = s,
      .band = problem.band,
      .scale = static_cast<float>(problem.scale),
      .scale_log2 = static_cast<float>(problem.scale * M_LOG2E),
      .order = block_order(problem, kTiles.block_k(), blocks),
      .group_splits = problem.group_splits,
      .row_terms = static_cast<const char*>(problem.row_stats),
      .dq_accum = static_cast<float*>(problem.dq_accum),
      .dk = problem.dk,
      .dv = problem.dv,
      .dkv_partial = problem.dkv_partial,
      .semaphores = problem.semaphores,
      .next_block = problem.queues + kKeyBlocks,
  };
  const LaunchConfig config = {
      .blocks = blocks,
      .threads = sm90::backward_threads(kHasDq),
      .shared_bytes = sm90::BackwardSmem<kTiles>::kLaunchBytes,
      .stream = stream,
  };
  return problem.dtype == DType::kFloat16
             ? launch<sm90::backward_kernel<kHeadDim, Float16, kHasDq>>(config, q_map, k_map, v_map,
                                                                        dout_map, params)
             : launch<sm90::backward_kernel<kHeadDim, BFloat16, kHasDq>>(config, q_map, k_map,
                                                                         v_map, dout_map, params);
}

template <int kHeadDim>
Status launch_split_dq(const BackwardProblem& problem, cudaStream_t stream) {
  static constexpr sm90::DqTiles kTiles = sm90::dq_tiles(kHeadDim);
  static_assert(kTiles.head_dim == kHeadDim, "no row for this head dim in tiles_backward.h");
  const Shape& s = problem.shape;
  const int query_tiles = (s.query_len + kTiles.block_q() - 1) / kTiles.block_q();
  int64_t blocks = 0;
  if (Status e = persistent_blocks(s.batch * s.query_heads * query_tiles, blocks); !e.ok())
    return e;
  CUtensorMap q_map, k_map, v_map, dout_map;
  if (Status e = encode_operands(problem, 64, kTiles.block_k, q_map, k_map, v_map, dout_map);
      !e.ok())
    return e;
  // Of K and V of the heads that are worked on together, as much as L2 keeps.
  constexpr int kSectionMb = 32;
  const sm90::DqParams params = {
      .shape = s,
      .band = problem.band,
      .scale = static_cast<float>(problem.scale),
      .scale_log2 = static_cast<float>(problem.scale * M_LOG2E),
      .order = tile_order(s, problem.band, query_tiles, static_cast<int>(blocks), kSectionMb),
      .row_terms = static_cast<const char*>(problem.row_stats),
      .dq = problem.dq,
      .next_tile = problem.queues + kQueryTiles,
  };
  const LaunchConfig config = {
      .blocks = blocks,
      .threads = kTiles.threads(),
      .shared_bytes = sm90::DqSmem<kTiles>::kLaunchBytes,
      .stream = stream,
  };
  return problem.dtype == DType::kFloat16 ? launch<sm90::split_dq_kernel<kHeadDim, Float16>>(
                                                config, q_map, k_map, v_map, dout_map, params)
                                          : launch<sm90::split_dq_kernel<kHeadDim, BFloat16>>(
                                                config, q_map, k_map, v_map, dout_map, params);
}

template <int kHeadDim>
Status launch_backward_sm90(const BackwardProblem& problem, cudaStream_t stream) {
  if constexpr (sm90::backward_tiles(kHeadDim).fuses_dq()) {
    if (problem.dq_accum != nullptr) return launch_key_blocks<kHeadDim, true>(problem, stream);
  }
  if (Status s = launch_key_blocks<kHeadDim, false>(problem, stream); !s.ok()) return s;
  return launch_split_dq<kHeadDim>(problem, stream);
}

}  // namespace jax_flash2::gpu
