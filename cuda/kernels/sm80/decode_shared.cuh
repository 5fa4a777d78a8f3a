// Decoding: what a kernel is compiled for, its shared memory, and what goes through it.
#pragma once

#include "device/copy.cuh"
#include "kernels/sm80/decode_work.cuh"

namespace jax_flash2::sm80 {

// kCluster: thread blocks that work on a unit together and merge through shared memory; 1: each
// has a part of the whole work, and what is shared is merged through global memory.
template <typename Math_, int kHeadDim_, bool kMany, int kCluster_ = 1>
struct DecodeConfig {
  using Math = Math_;
  using Element = typename Math::Element;
  static constexpr DecodeTile kTile = sizeof(Element) == 2 ? find_tile(kDecodeTiles16, kHeadDim_)
                                                           : find_tile(kDecodeTiles32, kHeadDim_);
  static_assert(kTile.head_dim == kHeadDim_, "decode_plan.h lacks a tile for this head dim");
  static constexpr int kHeadDim = kHeadDim_, kKeys = kTile.keys;
  // Keys that a loader asks for at once: half a tile, if that is a whole number of pages' groups.
  static constexpr int kBatch = kKeys / 2 > kPageMultiple ? kKeys / 2 : kPageMultiple;
  static constexpr int kRows = kMany ? kTile.many_rows : kDecodeFewRows;
  // On a multiprocessor: one loads while the other computes, unless registers are too few for two.
  static constexpr int kCluster = kCluster_, kBlocks = kMany || kCluster > 1 ? 1 : 2;
  // Warps with keys of their own in S = Q K^T, and how many; columns of O for each warp.
  static constexpr int kKeyWarps = kKeys / 16 < kDecodeWarps ? kKeys / 16 : kDecodeWarps;
  static constexpr int kWarpKeys = kKeys / kKeyWarps, kWarpCols = kHeadDim / kDecodeWarps;
  static_assert(2 * kKeys * kHeadDim * sizeof(Element) == kDecodeStageBytes,
                "all stages are alike");
  static_assert(kRows <= kDecodeRows, "workspaces have room for so many rows");
};

template <typename Config>
struct DecodeShared {
  using Element = typename Config::Element;
  static constexpr int kRows = Config::kRows, kKeys = Config::kKeys;
  static constexpr int kGroups = kKeys / kPageMultiple;
  static constexpr int kPCols = sizeof(Element) == 4 && kKeys < 32 ? 32 : kKeys;  // 128 bytes a row
  using QTile = SmemTile<Element, kRows, Config::kHeadDim>;
  using PTile = SmemTile<Element, kRows, kPCols>;
  using KvTile = SmemTile<Element, kKeys, Config::kHeadDim>;
  using OTile = SmemTile<float, kRows, Config::kHeadDim>;

  static constexpr int kP = QTile::kBytes;
  static constexpr int kExchange = kP + PTile::kBytes;
  static constexpr int kMissing = kExchange + kRows * kDecodeWarps * 4;
  static constexpr int kBarriers = kMissing + kDecodeStages * kGroups * 4;
  static constexpr int kStages = int(round_up(kBarriers + kDecodeStages * 32, 1024));
  static constexpr int bytes(int stages) { return kStages + stages * kDecodeStageBytes; }
  static_assert(bytes(2) <= 99 * 1024, "sm_86 and sm_89 give a block 99 KB");
  static_assert(kBarriers % 8 == 0, "barriers are words of 8 bytes");
  static_assert(kP % 1024 == 0 && kExchange % 1024 == 0 && KvTile::kBytes % 1024 == 0,
                "the swizzle wants every tile aligned to 1024 bytes");
  static_assert(OTile::kBytes + kRows * 8 <= 2 * kDecodeStageBytes,
                "a block's own results have room in the stages");

  uint32_t base;
  JF2_DEVICE QTile q() const { return {base}; }
  JF2_DEVICE PTile p() const { return {base + kP}; }
  JF2_DEVICE KvTile k(int stage) const { return {base + kStages + stage * kDecodeStageBytes}; }
  JF2_DEVICE KvTile v(int stage) const { return {k(stage).base + KvTile::kBytes}; }
  // Where no tile is under way any more: a block's own O, m and l.
  JF2_DEVICE OTile o() const { return {base + kStages}; }
  JF2_DEVICE uint32_t states() const { return base + kStages + OTile::kBytes; }

  // A number of every computing warp for every row, from each to all.
  JF2_DEVICE void give(int row, int warp, float x) const {
    ptx::sts_f32(base + kExchange + (row * kDecodeWarps + warp) * 4, x);
  }
  JF2_DEVICE float4 take(int row) const {
    static_assert(kDecodeWarps == 4, "a float4 holds a number of each warp");
    return ptx::lds_f32x4(base + kExchange + row * kDecodeWarps * 4);
  }
  // Has a group of a stage's keys no page?
  JF2_DEVICE void set_missing(int stage, int group, bool missing) const {
    ptx::sts_32(base + kMissing + (stage * kGroups + group) * 4, missing);
  }
  JF2_DEVICE bool is_missing(int stage, int group) const {
    return ptx::lds_32(base + kMissing + (stage * kGroups + group) * 4) != 0;
  }
  // K (0) or V (1) of the stage has landed; and may be overwritten.
  JF2_DEVICE uint32_t full(int stage, int side) const {
    return base + kBarriers + stage * 32 + side * 16;
  }
  JF2_DEVICE uint32_t empty(int stage, int side) const { return full(stage, side) + 8; }

  // Those of a stage, by one thread.
  JF2_DEVICE void init_barriers(int stage) const {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      // What each lane of the warp that loads has copied, and what the first has stored.
      ptx::mbarrier_init(full(stage, side), 33);
      ptx::mbarrier_init(empty(stage, side), side == 0 ? Config::kKeyWarps : kDecodeWarps);
    }
  }
};

// Which stage is next, and the parity of its barriers' phase.
struct StageRing {
  int stage = 0;
  uint32_t parity = 0;

  JF2_DEVICE void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace jax_flash2::sm80
