// The tiles of the sm_80 backward for every head dim. Plain C++.
//
// A head dim may have several rows, the fastest first: a device runs the first one that fits the
// shared memory it gives a block. shared_bytes() is that need.
#pragma once

#include "core/problem.h"

namespace jax_flash2::sm80 {

// How the warps of a block share a product: a grid over the rows and the columns of its result.
struct WarpGrid {
  int rows, cols;
};

struct BackwardTile {
  int head_dim;
  int block_q;  // query rows of a step
  int block_k;  // keys of a thread block
  int warps;
  WarpGrid scores;       // of S and dP, block_q x block_k; may be fewer warps than there are
  WarpGrid dkv;          // of dK and dV, block_k x head_dim
  WarpGrid dq;           // of dQ, block_q x head_dim
  int stages;            // Q and dO tiles in flight: 1 or 2
  int blocks_per_sm;     // what the registers are limited for
  bool p_in_ds = false;  // P and dS take turns in one buffer
};

// float16 and bfloat16. The last row of a head dim fits the 99 KB that sm_86, sm_89 and sm_120 give
// a block; sm_80 gives 163 KB, sm_90 227 KB.
inline constexpr BackwardTile kBackwardTiles16[] = {
    {.head_dim = 64,
     .block_q = 128,
     .block_k = 128,
     .warps = 8,
     .scores = {4, 2},
     .dkv = {4, 2},
     .dq = {4, 2},
     .stages = 2,
     .blocks_per_sm = 1},
    {.head_dim = 64,
     .block_q = 64,
     .block_k = 128,
     .warps = 8,
     .scores = {2, 4},
     .dkv = {4, 2},
     .dq = {4, 2},
     .stages = 2,
     .blocks_per_sm = 1},
    {.head_dim = 96,
     .block_q = 64,
     .block_k = 128,
     .warps = 8,
     .scores = {2, 4},
     .dkv = {4, 2},
     .dq = {4, 2},
     .stages = 2,
     .blocks_per_sm = 1},
    {.head_dim = 96,
     .block_q = 64,
     .block_k = 64,
     .warps = 4,
     .scores = {2, 2},
     .dkv = {2, 2},
     .dq = {2, 2},
     .stages = 2,
     .blocks_per_sm = 1},
    {.head_dim = 128,
     .block_q = 64,
     .block_k = 128,
     .warps = 8,
     .scores = {2, 4},
     .dkv = {4, 2},
     .dq = {2, 4},
     .stages = 2,
     .blocks_per_sm = 1},
    {.head_dim = 128,
     .block_q = 64,
     .block_k = 64,
     .warps = 4,
     .scores = {2, 2},
     .dkv = {2, 2},
     .dq = {2, 2},
     .stages = 1,
     .blocks_per_sm = 1},
    {.head_dim = 192,
     .block_q = 64,
     .block_k = 64,
     .warps = 8,
     .scores = {4, 2},
     .dkv = {2, 4},
     .dq = {2, 4},
     .stages = 2,
     .blocks_per_sm = 1},
    {.head_dim = 192,
     .block_q = 32,
     .block_k = 64,
     .warps = 8,
     .scores = {2, 4},
     .dkv = {2, 4},
     .dq = {2, 4},
     .stages = 1,
     .blocks_per_sm = 1},
    {.head_dim = 256,
     .block_q = 64,
     .block_k = 64,
     .warps = 8,
     .scores = {4, 2},
     .dkv = {2, 4},
     .dq = {2, 4},
     .stages = 2,
     .blocks_per_sm = 1},
    {.head_dim = 256,
     .block_q = 64,
     .block_k = 64,
     .warps = 8,
     .scores = {4, 2},
     .dkv = {2, 4},
     .dq = {2, 4},
     .stages = 1,
     .blocks_per_sm = 1},
    {.head_dim = 256,
     .block_q = 32,
     .block_k = 32,
     .warps = 4,
     .scores = {2, 2},
     .dkv = {1, 4},
     .dq = {1, 4},
     .stages = 1,
     .blocks_per_sm = 1},
};

// float32, at either precision. They all fit 99 KB.
inline constexpr BackwardTile kBackwardTiles32[] = {
    {.head_dim = 64,
     .block_q = 32,
     .block_k = 64,
     .warps = 4,
     .scores = {2, 2},
     .dkv = {2, 2},
     .dq = {2, 2},
     .stages = 1,
     .blocks_per_sm = 2},
    {.head_dim = 96,
     .block_q = 32,
     .block_k = 32,
     .warps = 4,
     .scores = {2, 2},
     .dkv = {2, 2},
     .dq = {2, 2},
     .stages = 1,
     .blocks_per_sm = 2},
    {.head_dim = 128,
     .block_q = 32,
     .block_k = 32,
     .warps = 4,
     .scores = {2, 2},
     .dkv = {2, 2},
     .dq = {2, 2},
     .stages = 1,
     .blocks_per_sm = 2},
    {.head_dim = 192,
     .block_q = 16,
     .block_k = 32,
     .warps = 4,
     .scores = {1, 2},
     .dkv = {2, 2},
     .dq = {1, 4},
     .stages = 1,
     .blocks_per_sm = 2},
    {.head_dim = 256,
     .block_q = 16,
     .block_k = 32,
     .warps = 4,
     .scores = {1, 2},
     .dkv = {2, 2},
     .dq = {1, 4},
     .stages = 1,
     .blocks_per_sm = 1,
     .p_in_ds = true},
};

// The dQ kernel of split mode: tiled as the forward is.
struct DqTile {
  int head_dim;
  int block_q;  // query rows of a thread block, split over its warps
  int block_k;  // keys of a step
  int warps;
  int stages;  // K and V tiles in flight: 1 or 2
  int blocks_per_sm;
};

inline constexpr DqTile kDqTiles16[] = {
    {.head_dim = 64, .block_q = 128, .block_k = 64, .warps = 4, .stages = 2, .blocks_per_sm = 2},
    {.head_dim = 96, .block_q = 128, .block_k = 32, .warps = 4, .stages = 2, .blocks_per_sm = 2},
    {.head_dim = 128, .block_q = 128, .block_k = 32, .warps = 4, .stages = 2, .blocks_per_sm = 2},
    {.head_dim = 192, .block_q = 64, .block_k = 32, .warps = 4, .stages = 2, .blocks_per_sm = 2},
    {.head_dim = 256, .block_q = 64, .block_k = 32, .warps = 4, .stages = 1, .blocks_per_sm = 2},
};

inline constexpr DqTile kDqTiles32[] = {
    {.head_dim = 64, .block_q = 64, .block_k = 32, .warps = 4, .stages = 1, .blocks_per_sm = 2},
    {.head_dim = 96, .block_q = 64, .block_k = 32, .warps = 4, .stages = 1, .blocks_per_sm = 2},
    {.head_dim = 128, .block_q = 64, .block_k = 16, .warps = 4, .stages = 1, .blocks_per_sm = 2},
    {.head_dim = 192, .block_q = 32, .block_k = 32, .warps = 2, .stages = 1, .blocks_per_sm = 2},
    {.head_dim = 256, .block_q = 32, .block_k = 16, .warps = 2, .stages = 1, .blocks_per_sm = 2},
};

// What a thread block needs, in bytes: K, V, the stages of Q, dO, LSE and D, and P and dS.
constexpr int shared_bytes(const BackwardTile& tile, int element) {
  return element *
             (2 * tile.block_k * tile.head_dim + tile.stages * 2 * tile.block_q * tile.head_dim +
              (tile.p_in_ds ? 1 : 2) * tile.block_q * tile.block_k) +
         tile.stages * 2 * tile.block_q * 4;
}
// Q, dO, and the stages of K and V.
constexpr int shared_bytes(const DqTile& tile, int element) {
  return element * tile.head_dim * (2 * tile.block_q + tile.stages * 2 * tile.block_k);
}

// Shared memory that a block may have on sm_90 and sm_100, on sm_80, and on sm_86, sm_89 and
// sm_120.
inline constexpr int kSharedClasses[] = {227 * 1024, 163 * 1024, 99 * 1024};

// The first row of `head_dim` that needs at most `shared` bytes; one of head dim 0 if there is
// none.
template <typename Tile, int kCount>
constexpr Tile find_tile(const Tile (&tiles)[kCount], int head_dim, int element, int shared) {
  for (const Tile& tile : tiles)
    if (tile.head_dim == head_dim && shared_bytes(tile, element) <= shared) return tile;
  return {};
}
constexpr BackwardTile backward_tile(int head_dim, int element, int shared) {
  return element == 2 ? find_tile(kBackwardTiles16, head_dim, element, shared)
                      : find_tile(kBackwardTiles32, head_dim, element, shared);
}
constexpr DqTile dq_tile(int head_dim, int element, int shared) {
  return element == 2 ? find_tile(kDqTiles16, head_dim, element, shared)
                      : find_tile(kDqTiles32, head_dim, element, shared);
}

// Whether a device that runs code compiled for `arch` may choose this tile. Code for sm_80 and its
// PTX run on what is newer, too.
constexpr bool tile_needed(const BackwardTile& tile, int element, int arch) {
  const bool large = arch == 900, small = arch == 860 || arch == 890;
  if (!large && !small) return true;
  const BackwardTile chosen = backward_tile(tile.head_dim, element, kSharedClasses[large ? 0 : 2]);
  return shared_bytes(tile, element) == shared_bytes(chosen, element);
}

}  // namespace jax_flash2::sm80
