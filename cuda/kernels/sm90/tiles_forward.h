// The tile rows of the sm_90a forward: the kernel's one non-type template argument.
#pragma once

#include "core/mask.h"

namespace jax_flash2::sm90 {

// Ping-pong: what a warpgroup issues to the tensor cores while the others wait for their turn.
enum class Turn { kNone, kScores, kScoresAndOutput };

struct ForwardTiles {
  int head_dim;   // of query, key and value; smaller ones round up
  int consumers;  // warpgroups of 64 query rows
  int block_k;    // keys a step
  int stages;     // K and V tiles in flight, each
  bool joint;     // K and V of a step share a stage: fewer barriers, where there is room
  int q_buffers;  // 2: the next tile's Q loads during this one, and O has a buffer of its own
  Turn turn;
  int section_mb;          // of K and V of the heads that are taken together where rows are long
  int producer_registers;  // a thread, after setmaxnreg
  int consumer_registers;

  JF2_HOST_DEVICE constexpr int block_q() const { return 64 * consumers; }
  JF2_HOST_DEVICE constexpr int threads() const { return 128 * (consumers + 1); }
};

// Measured choices: benchmarks/RESULTS.md. S (block_k / 2 registers), P (block_k / 4) and O
// (head_dim / 2) must fit a consumer thread; Q, K, V and O the 227 KB of shared memory.
inline constexpr ForwardTiles kForwardTiles[] = {
    {.head_dim = 64,
     .consumers = 4,
     .block_k = 64,
     .stages = 8,
     .joint = true,
     .q_buffers = 2,
     .turn = Turn::kScores,
     .section_mb = 32,
     .producer_registers = 32,
     .consumer_registers = 112},
    {.head_dim = 96,
     .consumers = 2,
     .block_k = 128,
     .stages = 2,
     .joint = false,
     .q_buffers = 2,
     .turn = Turn::kScoresAndOutput,
     .section_mb = 32,
     .producer_registers = 40,
     .consumer_registers = 232},
    {.head_dim = 128,
     .consumers = 2,
     .block_k = 128,
     .stages = 2,
     .joint = false,
     .q_buffers = 2,
     .turn = Turn::kScoresAndOutput,
     .section_mb = 32,
     .producer_registers = 40,
     .consumer_registers = 232},
    {.head_dim = 192,
     .consumers = 2,
     .block_k = 96,
     .stages = 2,
     .joint = false,
     .q_buffers = 1,
     .turn = Turn::kScoresAndOutput,
     .section_mb = 32,
     .producer_registers = 40,
     .consumer_registers = 232},
    {.head_dim = 256,
     .consumers = 2,
     .block_k = 64,
     .stages = 2,
     .joint = false,
     .q_buffers = 1,
     .turn = Turn::kScoresAndOutput,
     .section_mb = 64,
     .producer_registers = 40,
     .consumer_registers = 232},
};

JF2_HOST_DEVICE constexpr ForwardTiles forward_tiles(int head_dim) {
  for (const ForwardTiles& row : kForwardTiles)
    if (row.head_dim == head_dim) return row;
  return {};
}

}  // namespace jax_flash2::sm90
