// The tile rows of the sm_90a backward: the kernel's one non-type template argument.
#pragma once

#include "core/mask.h"

namespace jax_flash2::sm90 {

// How the two consumer warpgroups share a key block.
enum class Share {
  kKeys,      // 64 keys each
  kMatrices,  // the same 64 keys: one has S, P and dV, the other dP, dS and dK
};

struct BackwardTiles {
  int head_dim;  // of query, key and value; smaller ones round up
  Share share;
  int block_q;             // queries a step
  int stages;              // Q and dO tiles in flight, each
  int dq_cols;             // columns of dQ that the first warpgroup multiplies at once
  int dq_registers;        // a thread of the first warpgroup, after setmaxnreg
  int consumer_registers;  // a thread of the others

  JF2_HOST_DEVICE constexpr int block_k() const { return share == Share::kKeys ? 128 : 64; }
};

// Measured choices: benchmarks/RESULTS.md. S or dP (block_q / 2 registers), P and dS (half of that)
// and the gradients (head_dim in all, or in each warpgroup where they share matrices) must fit a
// consumer thread; K, V, the stages and the tiles of P and dS the 227 KB of shared memory.
inline constexpr BackwardTiles kBackwardTiles[] = {
    {.head_dim = 64,
     .share = Share::kKeys,
     .block_q = 128,
     .stages = 3,
     .dq_cols = 64,
     .dq_registers = 72,
     .consumer_registers = 216},
    {.head_dim = 96,
     .share = Share::kKeys,
     .block_q = 64,
     .stages = 3,
     .dq_cols = 96,
     .dq_registers = 88,
     .consumer_registers = 208},
    {.head_dim = 128,
     .share = Share::kKeys,
     .block_q = 64,
     .stages = 3,
     .dq_cols = 64,
     .dq_registers = 72,
     .consumer_registers = 216},
    {.head_dim = 192,
     .share = Share::kMatrices,
     .block_q = 64,
     .stages = 2,
     .dq_cols = 64,
     .dq_registers = 72,
     .consumer_registers = 216},
    {.head_dim = 256,
     .share = Share::kMatrices,
     .block_q = 64,
     .stages = 2,
     .dq_cols = 64,
     .dq_registers = 72,
     .consumer_registers = 216},
};

JF2_HOST_DEVICE constexpr BackwardTiles backward_tiles(int head_dim) {
  for (const BackwardTiles& row : kBackwardTiles)
    if (row.head_dim == head_dim) return row;
  return {};
}

}  // namespace jax_flash2::sm90
