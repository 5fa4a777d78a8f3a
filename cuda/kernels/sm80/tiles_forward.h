// The tile of the sm_80 forward for every head dim: one row each. Plain C++.
#pragma once

namespace jax_flash2::sm80 {

struct ForwardTile {
  int head_dim;
  int block_q;  // query rows of a thread block, split over its warps
  int block_k;  // keys of a step
  int warps;
  int stages;         // K and V tiles in flight: 1 or 2
  int blocks_per_sm;  // what the registers are limited for
  bool q_in_registers;
  int max_lag;  // see OnlineSoftmax::step
};

// float16 and bfloat16. Every tile fits the 99 KB of shared memory that sm_86 and sm_89 give a
// block.
inline constexpr ForwardTile kForwardTiles16[] = {
    {.head_dim = 64,
     .block_q = 128,
     .block_k = 128,
     .warps = 4,
     .stages = 1,
     .blocks_per_sm = 2,
     .q_in_registers = false,
     .max_lag = -1},
    {.head_dim = 96,
     .block_q = 128,
     .block_k = 64,
     .warps = 4,
     .stages = 1,
     .blocks_per_sm = 2,
     .q_in_registers = false,
     .max_lag = -1},
    {.head_dim = 128,
     .block_q = 128,
     .block_k = 64,
     .warps = 4,
     .stages = 2,
     .blocks_per_sm = 2,
     .q_in_registers = false,
     .max_lag = 8},
    {.head_dim = 192,
     .block_q = 64,
     .block_k = 64,
     .warps = 4,
     .stages = 1,
     .blocks_per_sm = 2,
     .q_in_registers = true,
     .max_lag = 0},
    {.head_dim = 256,
     .block_q = 64,
     .block_k = 64,
     .warps = 4,
     .stages = 1,
     .blocks_per_sm = 2,
     .q_in_registers = false,
     .max_lag = -1},
};

// float32, at either precision.
inline constexpr ForwardTile kForwardTiles32[] = {
    {.head_dim = 64,
     .block_q = 64,
     .block_k = 64,
     .warps = 4,
     .stages = 1,
     .blocks_per_sm = 2,
     .q_in_registers = false,
     .max_lag = 0},
    {.head_dim = 96,
     .block_q = 64,
     .block_k = 32,
     .warps = 4,
     .stages = 1,
     .blocks_per_sm = 2,
     .q_in_registers = false,
     .max_lag = 0},
    {.head_dim = 128,
     .block_q = 64,
     .block_k = 16,
     .warps = 4,
     .stages = 1,
     .blocks_per_sm = 2,
     .q_in_registers = false,
     .max_lag = 0},
    {.head_dim = 192,
     .block_q = 64,
     .block_k = 16,
     .warps = 4,
     .stages = 1,
     .blocks_per_sm = 2,
     .q_in_registers = false,
     .max_lag = 0},
    {.head_dim = 256,
     .block_q = 64,
     .block_k = 16,
     .warps = 4,
     .stages = 1,
     .blocks_per_sm = 2,
     .q_in_registers = false,
     .max_lag = 0},
};

// The row of `head_dim`; one of head dim 0 where there is none.
template <int kCount>
constexpr ForwardTile find_tile(const ForwardTile (&tiles)[kCount], int head_dim) {
  for (const ForwardTile& tile : tiles)
    if (tile.head_dim == head_dim) return tile;
  return {};
}

}  // namespace jax_flash2::sm80
