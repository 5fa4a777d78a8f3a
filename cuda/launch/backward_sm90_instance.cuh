// The sm_90a backward of one head-dim template. Compiled for sm_90a alone.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/sm90/backward.cuh"
#include "launch/backward.h"
#include "launch/tensor_map.h"

namespace jax_flash2::gpu {

// Full attention: head by head. Under a causal mask the first blocks have the most to do and go first,
// over as many heads at once as keep their queries and sums of dQ in L2.
inline sm90::BlockOrder block_order(const BackwardProblem& problem, int block_k) {
  const Shape& s = problem.shape;
  const int heads = static_cast<int>(s.batch * s.kv_heads * problem.group_splits);
  const int key_blocks = static_cast<int>(round_up(s.kv_len, block_k) / block_k);
  if (problem.band.upper >= kUnbounded) return {key_blocks, heads, 1};
  constexpr double kL2Bytes = 48e6;
  const double head_bytes = double(s.query_heads) / (s.kv_heads * problem.group_splits) *
                            s.query_len * (4.0 * s.head_dim + 2.0 * (s.head_dim + s.value_dim));
  const double section = kL2Bytes / std::max(head_bytes, 1.0);
  return {key_blocks, heads, static_cast<int>(std::clamp(section, 1.0, double(heads)))};
}

template <int kHeadDim>
Status launch_backward_sm90(const BackwardProblem& problem, cudaStream_t stream) {
  static constexpr sm90::BackwardTiles kTiles = sm90::backward_tiles(kHeadDim);
  static_assert(kTiles.head_dim == kHeadDim, "no row for this head dim in tiles_backward.h");
  const Shape& s = problem.shape;
  CUtensorMap q_map, k_map, v_map, dout_map;
  struct Operand {
    CUtensorMap& map;
    const void* data;
    int rows, heads, cols, box_rows;
  };
  const Operand operands[] = {
      {q_map, problem.q, s.query_len, s.query_heads, s.head_dim, kTiles.block_q},
      {dout_map, problem.dout, s.query_len, s.query_heads, s.value_dim, kTiles.block_q},
      {k_map, problem.k, s.kv_len, s.kv_heads, s.head_dim, kTiles.block_k()},
      {v_map, problem.v, s.kv_len, s.kv_heads, s.value_dim, kTiles.block_k()},
  };
  for (const Operand& o : operands) {
    Status e = encode_tensor_map(
        {o.data, problem.dtype, s.batch, o.rows, o.heads, o.cols, o.box_rows}, o.map);
    if (!e.ok()) return e;
  }
  const sm90::BackwardParams params = {
      .shape = s,
      .band = problem.band,
      .scale = static_cast<float>(problem.scale),
      .scale_log2 = static_cast<float>(problem.scale * M_LOG2E),
      .order = block_order(problem, kTiles.block_k()),
      .group_splits = problem.group_splits,
      .row_terms = static_cast<const char*>(problem.row_stats),
      .dq_accum = static_cast<float*>(problem.dq_accum),
      .dk = problem.dk,
      .dv = problem.dv,
      .dkv_partial = problem.dkv_partial,
      .next_block = problem.next_block,
  };
  const int64_t heads = s.batch * s.kv_heads * problem.group_splits;
  int64_t blocks = 0;
  if (Status e = persistent_blocks(heads * params.order.key_blocks, blocks); !e.ok()) return e;
  const LaunchConfig config = {
      .blocks = blocks,
      .threads = sm90::kBackwardThreads,
      .shared_bytes = sm90::BackwardSmem<kTiles>::kLaunchBytes,
      .stream = stream,
  };
  return problem.dtype == DType::kFloat16 ? launch<sm90::backward_kernel<kHeadDim, Float16>>(
                                                config, q_map, k_map, v_map, dout_map, params)
                                          : launch<sm90::backward_kernel<kHeadDim, BFloat16>>(
                                                config, q_map, k_map, v_map, dout_map, params);
}

}  // namespace jax_flash2::gpu
