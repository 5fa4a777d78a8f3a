// Decoding: the tiles of every head dim, and what the launcher derives from a problem. Plain C++.
#pragma once

#include "core/decode.h"
#include "core/divisor.h"

namespace jax_flash2::sm80 {

// A tile of keys, K and V together, is 32 KB: few enough barriers for the bytes.
inline constexpr int kDecodeStageBytes = 32 * 1024;
// Of a multiprocessor, at most. More of them make reads slower, too.
inline constexpr int kDecodeStages = 4;
// Bytes that a multiprocessor has asked for and not got yet, at most. Fewer do not keep memory busy;
// with more of them memory is slower, even where it has nothing else to do.
inline constexpr int kDecodeBytesAhead = 64 * 1024;
inline constexpr int kDecodeWarps = 4;  // that compute; two more load, K and V
inline constexpr int kDecodeThreads = (kDecodeWarps + 2) * 32;

// Blocks of a cluster, where a call decodes in clusters (launch/select.cc), and the keys of a
// sequence up to which it does: with more, equal parts for all multiprocessors are faster.
inline constexpr int kDecodeCluster = 8;
inline constexpr int kDecodeClusterKeys = 2048;
// Rows of a block in most calls.
inline constexpr int kDecodeFewRows = 16;

struct DecodeTile {
  int head_dim;
  int keys;       // of a tile
  int many_rows;  // of a block in calls of more than kDecodeFewRows rows, if larger
};

// float16 and bfloat16.
inline constexpr DecodeTile kDecodeTiles16[] = {
    {.head_dim = 64, .keys = 128, .many_rows = 64},
    {.head_dim = 128, .keys = 64, .many_rows = 64},
    {.head_dim = 256, .keys = 32, .many_rows = 32},
};

// float32.
inline constexpr DecodeTile kDecodeTiles32[] = {
    {.head_dim = 64, .keys = 64, .many_rows = 32},
    {.head_dim = 128, .keys = 32, .many_rows = 32},
    {.head_dim = 256, .keys = 16, .many_rows = 16},
};

// The row of `head_dim`; one of head dim 0 where there is none.
template <int kCount>
constexpr DecodeTile find_tile(const DecodeTile (&tiles)[kCount], int head_dim) {
  for (const DecodeTile& tile : tiles)
    if (tile.head_dim == head_dim) return tile;
  return {};
}

struct DecodePlan {
  float scale_log2;     // scale * log2(e)
  int stages;           // tiles in shared memory, 2 to kDecodeStages
  uint64_t number;      // random: by which this launch knows its own pieces (decode_merge.cuh)
  int ahead;            // batches of keys under way to a loader at most, 2 or 4
  int rows;             // of a key/value head: N / K * T
  Divisor group;        // N / K
  Divisor row_blocks;   // of a key/value head
  Divisor parts;        // of a lane, where there are as many tiles
  Divisor lanes;        // heads that are worked on side by side: K, or 1
  Divisor units;        // of a sequence and lane: heads times blocks of rows
  Divisor page_groups;  // page size / kPageMultiple; 1 without pages
};

}  // namespace jax_flash2::sm80
