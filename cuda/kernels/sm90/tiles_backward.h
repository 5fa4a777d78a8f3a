// The tile rows of the sm_90a backward: the kernel's one non-type template argument.
#pragma once

#include "core/mask.h"

namespace jax_flash2::sm90 {

// How the two consumer warpgroups share a key block.
enum class Share {
  kKeys,      // 64 keys each
  kMatrices,  // the same 64 keys: one has S, P and dV, the other dP, dS and dK. dQ is not fused
};

struct BackwardTiles {
  int head_dim;  // of query, key and value; smaller ones round up
  Share share;
  int block_q;           // queries a step
  int stages;            // Q and dO tiles in flight, each
  int dq_cols;           // columns of dQ that are multiplied at once
  int loader_registers;  // a thread of each role, after setmaxnreg
  int dq_registers;      // 0 where dQ is not fused
  int consumer_registers;

  JF2_HOST_DEVICE constexpr int block_k() const { return share == Share::kKeys ? 128 : 64; }
  // With 64 keys a block there would be twice as many additions to dQ. They take longer than the two
  // products more of the split mode, which therefore serves as fused mode, too.
  JF2_HOST_DEVICE constexpr bool fuses_dq() const { return share == Share::kKeys; }
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
     .loader_registers = 24,
     .dq_registers = 88,
     .consumer_registers = 200},
    {.head_dim = 96,
     .share = Share::kKeys,
     .block_q = 64,
     .stages = 3,
     .dq_cols = 96,
     .loader_registers = 24,
     .dq_registers = 88,
     .consumer_registers = 200},
    {.head_dim = 128,
     .share = Share::kKeys,
     .block_q = 64,
     .stages = 3,
     .dq_cols = 64,
     .loader_registers = 24,
     .dq_registers = 72,
     .consumer_registers = 208},
    {.head_dim = 192,
     .share = Share::kMatrices,
     .block_q = 64,
     .stages = 2,
     .dq_cols = 0,
     .loader_registers = 24,
     .dq_registers = 0,
     .consumer_registers = 240},
    {.head_dim = 256,
     .share = Share::kMatrices,
     .block_q = 64,
     .stages = 2,
     .dq_cols = 0,
     .loader_registers = 24,
     .dq_registers = 0,
     .consumer_registers = 240},
};

JF2_HOST_DEVICE constexpr BackwardTiles backward_tiles(int head_dim) {
  for (const BackwardTiles& row : kBackwardTiles)
    if (row.head_dim == head_dim) return row;
  return {};
}

// dQ of the split mode, which has a kernel of its own.
struct DqTiles {
  int head_dim;
  int consumers;           // warpgroups of 64 query rows
  int block_k;             // keys a step
  int k_stages;            // tiles of K in flight: read by the first and the last product of a step
  int v_stages;            // tiles of V: read by the second
  int producer_registers;  // a thread, after setmaxnreg
  int consumer_registers;

  JF2_HOST_DEVICE constexpr int block_q() const { return 64 * consumers; }
  JF2_HOST_DEVICE constexpr int threads() const { return 128 * (consumers + 1); }
};

// S and dP (block_k / 2 registers each) and dQ (head_dim / 2) must fit a consumer thread; Q, dO and the
// stages the 227 KB of shared memory.
inline constexpr DqTiles kDqTiles[] = {
    {.head_dim = 64,
     .consumers = 3,
     .block_k = 64,
     .k_stages = 6,
     .v_stages = 6,
     .producer_registers = 32,
     .consumer_registers = 160},
    {.head_dim = 96,
     .consumers = 2,
     .block_k = 128,
     .k_stages = 3,
     .v_stages = 2,
     .producer_registers = 40,
     .consumer_registers = 232},
    {.head_dim = 128,
     .consumers = 2,
     .block_k = 128,
     .k_stages = 3,
     .v_stages = 2,
     .producer_registers = 40,
     .consumer_registers = 232},
    {.head_dim = 192,
     .consumers = 2,
     .block_k = 64,
     .k_stages = 3,
     .v_stages = 2,
     .producer_registers = 40,
     .consumer_registers = 232},
    {.head_dim = 256,
     .consumers = 2,
     .block_k = 64,
     .k_stages = 2,
     .v_stages = 1,
     .producer_registers = 40,
     .consumer_registers = 232},
};

JF2_HOST_DEVICE constexpr DqTiles dq_tiles(int head_dim) {
  for (const DqTiles& row : kDqTiles)
    if (row.head_dim == head_dim) return row;
  return {};
}

}  // namespace jax_flash2::sm90
