// What the roles of the sm_90a backward share: parameters, the queue's order, the record of a key block,
// and the layout of shared memory.
#pragma once

#include "core/problem.h"
#include "device/ring.cuh"
#include "device/row_terms.cuh"
#include "device/smem_sm90.cuh"
#include "kernels/sm90/tiles_backward.h"

namespace jax_flash2::sm90 {

// The order in which key blocks are handed out: inside a section of heads all first blocks, then all
// second blocks, ... A head here is a part of the query heads of a group (group_splits).
//
// Where dQ is summed in a fixed order, the last blocks go first, each walks over its query tiles upwards,
// and on a tile a block adds after all those that were handed out before it.
struct BlockOrder {
  int key_blocks;  // a head
  int heads;       // B * K * group_splits
  int section_heads;
  bool fixed;

  struct Block {
    int head, key_block;
  };
  JF2_HOST_DEVICE int blocks() const { return key_blocks * heads; }
  JF2_DEVICE Block at(int i) const {
    const int first = i / (section_heads * key_blocks) * section_heads;
    const int width = min(section_heads, heads - first);
    const int rest = i - first * key_blocks;
    const int block = rest / width;
    return {first + rest % width, fixed ? key_blocks - 1 - block : block};
  }
};

// The loader's warpgroup, two of consumers, and dQ's.
JF2_HOST_DEVICE constexpr int backward_threads(bool has_dq) { return (has_dq ? 4 : 3) * 128; }
// Named barriers; kProductTurn + the warpgroup whose turn it is.
enum BackwardBarrier { kConsumers = 1, kProductTurn = 2 };

struct BackwardParams {
  Shape shape;
  BandSpec band;
  float scale;
  float scale_log2;  // scale * log2(e)
  BlockOrder order;
  int group_splits;
  const char* row_terms;  // [B, N, Tp / 64, 2, 3, 64] bfloat16 (device/row_terms.cuh)
  float* dq_accum;        // [B, N, Tp, Hp]
  void* dk;               // [B, S, K, H]
  void* dv;               // [B, S, K, Hv]
  float* dkv_partial;     // [B, group_splits, S, K, H + Hv]; null where a block has a whole group
  int* semaphores;        // [B, N, Tp / kSemaphoreRows], key blocks whose dQ is added, or null
  int* next_block;        // the queue: blocks handed out
};

// One key block and the query tiles that see it. The loader works it out and leaves it in shared memory.
struct alignas(16) KeyBlock {
  int batch, kv_head, split, key_block;
  int first_head, heads;  // query heads
  int first_row;          // of the first query tile that sees a key
  int steps;              // query tiles that see a key, of all heads; 0: nobody sees the block
  Range whole;            // rows of the tiles that the band does not cut
  alignas(16) Band band;
  Range keys;  // of the block, those that some query sees
  Range rows;  // of the sequence, those that see some key
  bool live;   // false: the queue is empty

  static constexpr int kSlots = 2;
};

template <BackwardTiles kTiles>
JF2_DEVICE void fill_block(KeyBlock& block, const BackwardParams& p, int i) {
  block.live = i < p.order.blocks();
  if (!block.live) return;
  const BlockOrder::Block at = p.order.at(i);
  const int heads = p.shape.kv_heads * p.group_splits;
  const int part = at.head % heads;
  block.batch = at.head / heads;
  block.kv_head = part / p.group_splits;
  block.split = part % p.group_splits;
  block.key_block = at.key_block;
  block.heads = p.shape.group() / p.group_splits;
  block.first_head = part * block.heads;
  const Band band = p.band.at(block.batch, p.shape.query_len, p.shape.kv_len);
  const int key = at.key_block * kTiles.block_k();
  const Range keys = {key, key + kTiles.block_k()};
  const Range seeing = band.rows_of(keys), seeing_all = band.rows_seeing_all(keys);
  const Range seen = band.keys_of({0, band.query_length});
  block.band = band;
  block.keys = {max(key, seen.begin), min(key + kTiles.block_k(), seen.end)};
  block.rows = band.rows_of({0, band.kv_length});
  constexpr int kQ = kTiles.block_q;
  block.first_row = seeing.begin / kQ * kQ;
  block.steps = seeing.empty() ? 0 : (seeing.end - block.first_row + kQ - 1) / kQ * block.heads;
  block.whole = {(seeing_all.begin + kQ - 1) / kQ * kQ, seeing_all.end / kQ * kQ};
}

// Where dQ is summed in a fixed order: how many blocks add to that of a query tile before this one.
template <BackwardTiles kTiles>
JF2_DEVICE int turn_of(const KeyBlock& block, int row) {
  const Range keys = block.band.keys_of({row, row + kTiles.block_q});
  return (keys.end - 1) / kTiles.block_k() - block.key_block;
}

// Walks over the steps of a key block: its query tiles from the first to the last, and of each its
// heads, so that blocks of one group that run at a time are on the same queries.
template <BackwardTiles kTiles>
struct StepCursor {
  int first_head, end_head;
  int head, row;  // of the step: the query head, the first row of the tile
  int left;       // steps, this one among them

  JF2_DEVICE explicit StepCursor(const KeyBlock& block)
      : first_head(ptx::uniform(block.first_head)),
        end_head(first_head + ptx::uniform(block.heads)),
        head(first_head),
        row(ptx::uniform(block.first_row)),
        left(ptx::uniform(block.live ? block.steps : 0)) {}

  JF2_DEVICE void advance() {
    --left;
    if (++head == end_head) head = first_head, row += kTiles.block_q;
  }
  // Of the step, in the padded workspaces.
  JF2_DEVICE int64_t padded_row(const BackwardParams& p, int batch) const {
    // Opaque: what can be had again from constants shall hold no registers from step to step.
    const int padded_len = int(round_up(ptx::opaque(p.shape.query_len), kTokenTile));
    return (int64_t(batch) * p.shape.query_heads + head) * padded_len + row;
  }
};

template <BackwardTiles kTiles>
struct BackwardSmem {
  using KV = PanelTile<kTiles.block_k(), kTiles.head_dim>;
  using Q = PanelTile<kTiles.block_q, kTiles.head_dim>;
  using Scores = PanelTile<kTiles.block_k(), kTiles.block_q>;  // P^T or dS^T: a row a key
  using Terms = PanelTile<16, kTiles.block_q>;                 // a row a term of LSE or D
  static constexpr bool kSharesMatrices = kTiles.share == Share::kMatrices;
  static constexpr int kDsBuffers = kTiles.fuses_dq() ? 2 : 0;
  static constexpr int kQ = 2 * KV::kBytes;
  static constexpr int kDout = kQ + kTiles.stages * Q::kBytes;
  static constexpr int kDs = kDout + kTiles.stages * Q::kBytes;
  static constexpr int kP = kDs + kDsBuffers * Scores::kBytes;
  static constexpr int kLse = kP + (kSharesMatrices ? Scores::kBytes : 0);
  static constexpr int kDelta = kLse + kTiles.stages * Terms::kBytes;
  static constexpr int kBarriers = kDelta + kTiles.stages * Terms::kBytes;
  static constexpr int kBarrierCount =
      3 * KeyBlock::kSlots + 2 + 2 * kTiles.stages + 4 * kDsBuffers + 2;
  static constexpr int kBlockRecords = (kBarriers + 8 * kBarrierCount + 15) / 16 * 16;
  static constexpr int kEnd = kBlockRecords + int(sizeof(KeyBlock)) * KeyBlock::kSlots;
  static constexpr int kAlignment = 1024, kLimit = 232448 - kAlignment;  // of the 227 KB of a block
  // A panel of all keys, through which dV and dK leave. Where there is none, dS lends its tiles.
  using Staging = PanelTile<kTiles.block_k(), kPanelCols>;
  static constexpr int kStaging = (kEnd + kAlignment - 1) / kAlignment * kAlignment;
  static constexpr bool kHasStaging = kStaging + Staging::kBytes <= kLimit;
  static constexpr int kBytes = kHasStaging ? kStaging + Staging::kBytes : kEnd;
  static constexpr int kLaunchBytes = kBytes + kAlignment;
  static_assert(kBytes <= kLimit, "K, V, Q, dO, P and dS must fit");
  static_assert(kHasStaging || kDsBuffers > 0, "dV and dK must have a tile on the way out");

  uint32_t base;     // shared address, aligned to 1024 bytes
  KeyBlock* blocks;  // [KeyBlock::kSlots]

  // K and V of the key block in a slot. The two tiles change roles from block to block: the last is
  // done with its V first, and the next needs its K first.
  JF2_DEVICE KV k(int slot) const { return {base + slot * KV::kBytes}; }
  JF2_DEVICE KV v(int slot) const { return k(slot ^ 1); }
  JF2_DEVICE Q q(int stage) const { return {base + kQ + stage * Q::kBytes}; }
  JF2_DEVICE Q dout(int stage) const { return {base + kDout + stage * Q::kBytes}; }
  JF2_DEVICE Scores ds(int buffer) const { return {base + kDs + buffer * Scores::kBytes}; }
  JF2_DEVICE Scores p() const { return {base + kP}; }
  JF2_DEVICE Staging staging() const { return {base + kStaging}; }
  JF2_DEVICE Terms lse(int stage) const { return {base + kLse + stage * Terms::kBytes}; }
  JF2_DEVICE Terms delta(int stage) const { return {base + kDelta + stage * Terms::kBytes}; }
  // A key block's record is there and its K has arrived; its V has; nobody reads its record any more,
  // its K, its V.
  JF2_DEVICE uint32_t k_full(int slot) const { return barrier(slot); }
  JF2_DEVICE uint32_t v_full(int slot) const { return barrier(KeyBlock::kSlots + slot); }
  JF2_DEVICE uint32_t block_empty(int slot) const { return barrier(2 * KeyBlock::kSlots + slot); }
  JF2_DEVICE uint32_t k_empty() const { return barrier(kSteps - 2); }
  JF2_DEVICE uint32_t v_empty() const { return barrier(kSteps - 1); }
  // Q, dO, LSE and D of a step have arrived; they have been read.
  JF2_DEVICE uint32_t step_full(int stage) const { return barrier(kSteps + stage); }
  JF2_DEVICE uint32_t step_empty(int stage) const {
    return barrier(kSteps + kTiles.stages + stage);
  }
  // dS of a step is written; it has been read.
  JF2_DEVICE uint32_t ds_full(int i) const { return barrier(kScores + i); }
  JF2_DEVICE uint32_t ds_empty(int i) const { return barrier(kScores + kDsBuffers + i); }
  // In a fixed order: it is a step's turn to add to dQ; it has added.
  JF2_DEVICE uint32_t turn(int i) const { return barrier(kScores + 2 * kDsBuffers + i); }
  JF2_DEVICE uint32_t added(int i) const { return barrier(kScores + 3 * kDsBuffers + i); }
  // P of a step is written for the warpgroup that has dS; it has been read.
  JF2_DEVICE uint32_t p_full() const { return barrier(kScores + 4 * kDsBuffers); }
  JF2_DEVICE uint32_t p_empty() const { return barrier(kScores + 4 * kDsBuffers + 1); }

 private:
  static constexpr int kSteps = 3 * KeyBlock::kSlots + 2, kScores = kSteps + 2 * kTiles.stages;
  JF2_DEVICE uint32_t barrier(int i) const { return base + kBarriers + 8 * i; }
};

}  // namespace jax_flash2::sm90
