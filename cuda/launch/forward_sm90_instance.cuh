// The sm_90a forward of one head-dim template. Compiled for sm_90a alone.
#pragma once

#include <numbers>

#include "kernels/sm90/forward.cuh"
#include "launch/forward.h"
#include "launch/tensor_map.h"
#include "launch/tile_order.h"

namespace jax_flash2::gpu {

template <int kHeadDim>
Status launch_forward_sm90(const ForwardProblem& problem, cudaStream_t stream) {
  static constexpr sm90::ForwardTiles kTiles = sm90::forward_tiles(kHeadDim);
  static_assert(kTiles.head_dim == kHeadDim, "no row for this head dim in tiles_forward.h");
  const Shape& s = problem.shape;

  const int query_tiles = (s.query_len + kTiles.block_q() - 1) / kTiles.block_q();
  int64_t blocks = 0;
  if (Status e = persistent_blocks(s.batch * s.query_heads * query_tiles, blocks); !e.ok())
    return e;

  CUtensorMap q_map, k_map, v_map, out_map;
  const auto encode = [&](const void* data, int rows, int heads, int cols, int box_rows,
                          CUtensorMap& map) {
    return encode_tensor_map({data, problem.dtype, s.batch, rows, heads, cols, box_rows}, map);
  };
  if (Status e = encode(problem.q, s.query_len, s.query_heads, s.head_dim, kTiles.block_q(), q_map);
      !e.ok())
    return e;
  if (Status e = encode(problem.k, s.kv_len, s.kv_heads, s.head_dim, kTiles.block_k, k_map);
      !e.ok())
    return e;
  if (Status e = encode(problem.v, s.kv_len, s.kv_heads, s.value_dim, kTiles.block_k, v_map);
      !e.ok())
    return e;
  if (Status e = encode(problem.out, s.query_len, s.query_heads, s.value_dim, 16, out_map); !e.ok())
    return e;
  if (Status e = cuda_status(cudaMemsetAsync(problem.next_tile, 0, sizeof(int32_t), stream),
                             "clearing the tile queue");
      !e.ok())
    return e;

  const sm90::ForwardParams params = {
      .shape = s,
      .band = problem.band,
      .scale_log2 = static_cast<float>(problem.scale * std::numbers::log2e),
      .order =
          tile_order(s, problem.band, query_tiles, static_cast<int>(blocks), kTiles.section_mb),
      .blocks = static_cast<int>(blocks),
      .lse = static_cast<float*>(problem.lse),
      .out = problem.out,
      .next_tile = problem.next_tile,
  };
  const LaunchConfig config = {
      .blocks = blocks,
      .threads = kTiles.threads(),
      .shared_bytes = sm90::ForwardSmem<kTiles>::kLaunchBytes,
      .stream = stream,
  };
  return problem.dtype == DType::kFloat16 ? launch<sm90::forward_kernel<kHeadDim, Float16>>(
                                                config, q_map, k_map, v_map, out_map, params)
                                          : launch<sm90::forward_kernel<kHeadDim, BFloat16>>(
                                                config, q_map, k_map, v_map, out_map, params);
}

}  // namespace jax_flash2::gpu
