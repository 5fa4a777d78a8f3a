// Who does what when decoding: the tiles of keys of all sequences, one after the other, cut into
// equal parts, one a thread block. Found on the device, since lengths are known nowhere else.
//
// Within a sequence the order is: key/value head, block of rows, tile of keys. The tiles that
// one block of rows of one head sees are a unit: they add up to results of their own. A part ends
// where its number of tiles is reached, in the middle of a unit or not.
#pragma once

#include "device/ptx_sm80.cuh"
#include "kernels/sm80/decode_plan.h"

namespace jax_flash2::sm80 {

// The tiles of a sequence; one at least, so that results are written where nothing is seen.
template <int kKeys>
struct KeyTiles {
  Range keys;
  int first, count;

  JF2_DEVICE KeyTiles(const DecodeProblem& problem, const Band& band)
      : keys(band.keys_of({0, problem.shape.query_len})) {
    first = keys.begin / kKeys;
    count = max((keys.end + kKeys - 1) / kKeys - first, 1);
  }
};

// `total` tiles in `parts` parts, of which the first are longer by one where they do not divide.
struct Parts {
  unsigned size, longer;

  Parts() = default;
  JF2_DEVICE Parts(unsigned total, unsigned parts) : size(total / parts) {
    longer = total - size * parts;
  }
  // In `most`, or in as many as there are tiles.
  JF2_DEVICE Parts(unsigned total, const Divisor& most)
      : size(total < most.d ? 1 : most.quotient(total)) {
    longer = total < most.d ? 0 : total - size * most.d;
  }
  JF2_DEVICE unsigned begin(unsigned part) const { return part * size + min(part, longer); }
  JF2_DEVICE unsigned part_of(unsigned tile) const {
    const unsigned in_longer = longer * (size + 1);
    return tile < in_longer ? tile / (size + 1) : longer + (tile - in_longer) / size;
  }
};

JF2_DEVICE int warp_inclusive_sum(int x, int lane) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int y = __shfl_up_sync(~0u, x, d);
    if (lane >= d) x += y;
  }
  return x;
}

// A position in the order of tiles.
template <int kKeys>
struct DecodeCursor {
  int sequence;
  Band band;
  KeyTiles<kKeys> tiles;
  int unit;  // of the sequence
  int tile;  // of the unit

  // `at` counts the tiles of the sequence, whose length is known.
  JF2_DEVICE DecodeCursor(const DecodeProblem& problem, int sequence, int length, unsigned at)
      : sequence(sequence), band(problem.band_of(length)), tiles(problem, band) {
    unit = at < unsigned(tiles.count) ? 0 : int(at / unsigned(tiles.count));
    tile = int(at) - unit * tiles.count;
  }

  JF2_DEVICE bool ends_unit() const { return tile + 1 == tiles.count; }
  JF2_DEVICE int first_key() const { return (tiles.first + tile) * kKeys; }

  // To the next tile; there is one.
  JF2_DEVICE void advance(const DecodeProblem& problem, const DecodePlan& plan) {
    if (!ends_unit()) {
      ++tile;
    } else if (unsigned(unit + 1) < plan.units.d) {
      ++unit;
      tile = 0;
    } else {
      *this = DecodeCursor(problem, sequence + 1, problem.lengths[sequence + 1], 0);
    }
  }
};

// A thread block's part of the work.
struct DecodePart {
  Parts parts;
  unsigned index;   // of the part, in its lane
  int lane;         // the first key/value head
  int count;        // tiles; 0: nothing is left for this block
  int sequence;     // of its first tile
  int length;       // of this sequence
  unsigned offset;  // of its first tile among the sequence's

  // The tile after its last in the order of all tiles.
  JF2_DEVICE unsigned end() const { return parts.begin(index + 1); }
  // Which of all pieces is that of a part of this lane.
  JF2_DEVICE unsigned piece(const DecodePlan& plan, unsigned index) const {
    return index * plan.lanes.d + lane;
  }
  JF2_DEVICE int kv_head(const DecodePlan& plan, int unit) const {
    return lane + int(plan.row_blocks.quotient(unit));
  }
};

// Every warp finds its block's part on its own: 32 lanes sum the tiles of 32 runs of sequences,
// take the run that holds the part's first tile, and divide that run again.
template <int kKeys>
JF2_DEVICE DecodePart find_part(const DecodeProblem& problem, const DecodePlan& plan, int lane) {
  DecodePart part = {};
  int length = 0;  // of the lane's last sequence, in the end its only one
  int first = 0, number = int(problem.shape.batch);
  unsigned before = 0;  // tiles of a unit, over the sequences before `first`
  unsigned at = 0;      // the part's first tile in the order of all tiles
  do {
    const int run = (number + 31) / 32, limit = first + number;
    const int begin = min(first + lane * run, limit), end = min(begin + run, limit);
    int tiles = 0;
#pragma unroll 1
    for (int b = begin; b < end; ++b) {
      length = problem.lengths[b];
      tiles += KeyTiles<kKeys>(problem, problem.band_of(length)).count;
    }
    const int sum = warp_inclusive_sum(tiles, lane);
    if (part.count == 0) {  // the first time: these are all sequences
      const unsigned total = unsigned(__shfl_sync(~0u, sum, 31)) * plan.units.d;
      const unsigned active = min(total, plan.parts.d);
      if (blockIdx.x >= active * plan.lanes.d) return part;
      // The last part first: a block waits for later parts alone (decode_merge.cuh), which then
      // have lower indices and started before it.
      const unsigned index = active * plan.lanes.d - 1 - blockIdx.x;
      part.index = plan.lanes.quotient(index);
      part.lane = int(index - part.index * plan.lanes.d);
      part.parts = Parts(total, plan.parts);
      at = part.parts.begin(part.index);
      part.count = int(part.end() - at);
    }
    const unsigned reached = __ballot_sync(~0u, before + unsigned(sum) > plan.units.quotient(at));
    const int lane_of_run = __ffs(int(reached)) - 1;
    before += unsigned(__shfl_sync(~0u, sum - tiles, lane_of_run));
    part.length = __shfl_sync(~0u, length, lane_of_run);
    first += lane_of_run * run;
    number = min(run, limit - first);
  } while (number > 1);
  part.sequence = first;
  part.offset = at - before * plan.units.d;
  return part;
}

// In clusters, each has a unit, cut into a part for each of its blocks.
template <int kKeys, int kCluster>
JF2_DEVICE DecodePart find_part_of_unit(const DecodeProblem& problem, const DecodePlan& plan) {
  DecodePart part = {};
  const unsigned unit = blockIdx.x / kCluster;
  part.index = blockIdx.x % kCluster;
  part.sequence = int(plan.units.quotient(unit));
  part.length = problem.lengths[part.sequence];
  const unsigned count = KeyTiles<kKeys>(problem, problem.band_of(part.length)).count;
  part.parts = Parts(count, kCluster);
  const unsigned begin = part.parts.begin(part.index);
  part.count = int(part.end() - begin);
  // A tile that is there, where nothing is left.
  part.offset = plan.units.remainder(unit) * count + min(begin, count - 1);
  return part;
}

// The rows of one block of one key/value head: row i stands for query head i % group of the group
// at token i / group.
struct DecodeRows {
  int first, count, kv_head;
  int sequence;

  JF2_DEVICE DecodeRows(const DecodePlan& plan, const DecodePart& part, int sequence, int unit,
                        int block_rows)
      : kv_head(part.kv_head(plan, unit)), sequence(sequence) {
    first = int(plan.row_blocks.remainder(unit)) * block_rows;
    count = min(plan.rows - first, block_rows);
  }
  JF2_DEVICE int token(const DecodePlan& plan, int i) const {
    return int(plan.group.quotient(first + i));
  }
  JF2_DEVICE Range tokens(const DecodePlan& plan) const {
    return {token(plan, 0), token(plan, count - 1) + 1};
  }
  JF2_DEVICE int head(const DecodePlan& plan, int i) const {
    return kv_head * int(plan.group.d) + int(plan.group.remainder(first + i));
  }
  // Which of the [B, T, N] rows of q and out.
  JF2_DEVICE int64_t index(const Shape& shape, const DecodePlan& plan, int i) const {
    return (int64_t(sequence) * shape.query_len + token(plan, i)) * shape.query_heads +
           head(plan, i);
  }
  // Where in lse, [B, N, T].
  JF2_DEVICE int64_t lse_index(const Shape& shape, const DecodePlan& plan, int i) const {
    return (int64_t(sequence) * shape.query_heads + head(plan, i)) * shape.query_len +
           token(plan, i);
  }
};

}  // namespace jax_flash2::sm80
