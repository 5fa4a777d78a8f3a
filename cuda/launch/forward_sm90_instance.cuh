// The sm_90a forward of one head-dim template. Compiled for sm_90a alone.
#pragma once

#include <numbers>

#include "kernels/sm90/forward.cuh"
#include "launch/forward.h"
#include "launch/tensor_map.h"
#include "launch/tile_order.h"

namespace jax_flash2::gpu {

// How many heads of a group the rows of a tile are, as a power of two (log2): as few as fill the fewest
// tiles of `block_q` rows, at most 8, so that rows 8 apart are of one head.
inline int pack_heads(const Shape& s, int block_q) {
  const auto tiles = [&](int log2) {
    return (s.query_heads >> log2) * (((int64_t{s.query_len} << log2) + block_q - 1) / block_q);
  };
  int best = 0;
  for (int log2 = 1; log2 <= 3 && s.group() % (1 << log2) == 0; ++log2)
    if ((int64_t{s.query_len} << log2) <= kMaxLength && tiles(log2) < tiles(best)) best = log2;
  return best;
}

template <int kHeadDim>
Status launch_forward_sm90(const ForwardProblem& problem, cudaStream_t stream) {
  static constexpr sm90::ForwardTiles kTiles = sm90::forward_tiles(kHeadDim);
  static_assert(kTiles.head_dim == kHeadDim, "no row for this head dim in tiles_forward.h");
  const Shape& s = problem.shape;

  const int pack_log2 = pack_heads(s, kTiles.block_q()), pack = 1 << pack_log2;
  Shape packs = s;  // a pack of heads as one head
  packs.query_heads = s.query_heads / pack;
  const int64_t rows = int64_t{s.query_len} * pack;
  const int query_tiles = static_cast<int>((rows + kTiles.block_q() - 1) / kTiles.block_q());
  int64_t blocks = 0;
  if (Status e = persistent_blocks(s.batch * packs.query_heads * query_tiles, blocks); !e.ok())
    return e;

  CUtensorMap q_map, k_map, v_map, out_map;
  const auto encode = [&](const void* data, int rows, int heads, int cols, int box_rows,
                          int box_heads, CUtensorMap& map) {
    return encode_tensor_map(
        {data, problem.dtype, s.batch, rows, heads, cols, box_rows / box_heads, box_heads}, map);
  };
  if (Status e =
          encode(problem.q, s.query_len, s.query_heads, s.head_dim, kTiles.block_q(), pack, q_map);
      !e.ok())
    return e;
  if (Status e = encode(problem.k, s.kv_len, s.kv_heads, s.head_dim, kTiles.block_k, 1, k_map);
      !e.ok())
    return e;
  if (Status e = encode(problem.v, s.kv_len, s.kv_heads, s.value_dim, kTiles.block_k, 1, v_map);
      !e.ok())
    return e;
  if (Status e = encode(problem.out, s.query_len, s.query_heads, s.value_dim, 16, pack, out_map);
      !e.ok())
    return e;
  if (Status e = cuda_status(cudaMemsetAsync(problem.next_tile, 0, sizeof(int32_t), stream),
                             "clearing the tile queue");
      !e.ok())
    return e;

  const sm90::ForwardParams params = {
      .shape = s,
      .band = problem.band,
      .scale_log2 = static_cast<float>(problem.scale * std::numbers::log2e),
      .pack_log2 = pack_log2,
      .packs = packs.query_heads,
      .order =
          tile_order(packs, problem.band, query_tiles, static_cast<int>(blocks), kTiles.section_mb),
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
