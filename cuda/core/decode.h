// What a kernel that decodes is asked to do: few queries, at the end of sequences of many keys.
// Floor 0: plain C++. Letters as in core/problem.h.
//
// A row is one query head of a group at one token: row r of a key/value head is token r / group,
// head r % group. All rows of a head meet the same keys, so that they share one read of them.
#pragma once

#include "core/problem.h"

namespace jax_flash2 {

// Thread blocks that a GPU starts for a call, at most: the workspace holds a piece of each.
inline constexpr int kDecodeBlocks = 384;
// Rows that a thread block works on, at most.
inline constexpr int kDecodeRows = 64;
// Pages hold a multiple of this many keys, so that so many neighbours always share one.
inline constexpr int kPageMultiple = 16;

// What a thread block leaves of `rows` rows for another, in numbers of float32: a flag, m and l of
// each row, O of each row. The flag, and each m and l, take 16 bytes.
JF2_HOST_DEVICE constexpr int decode_piece_floats(int rows, int value_dim) {
  return 4 + rows * (4 + value_dim);
}

// Keys and values in pages that sequences hold in any order. Ids that name no page are masked.
struct Pages {
  const int32_t* table;  // [B, P]; null: no pages, the keys of a sequence lie together
  int per_sequence;      // P
  int size;              // keys of a page
  int count;             // pages that there are
};

// Row i of T sits at position lengths[b] - T + i and sees the keys up to its own position, at most
// window_left of them before its own. O and LSE as in ForwardProblem.
struct DecodeProblem {
  Shape shape;   // kv_len: the keys that a sequence has room for
  DType dtype;   // of q, k, v, out
  double scale;  // positive
  int window_left;
  Pages pages;
  const int32_t* lengths;  // [B], valid keys of each sequence, clamped to [0, S]
  const void* q;           // [B, T, N, H]
  const void* k;           // [B, S, K, H], or [pages, page size, K, H]
  const void* v;           // [B, S, K, Hv], or [pages, page size, K, Hv]
  void* out;               // [B, T, N, Hv]
  void* lse;               // [B, N, T], float32 (float64 where dtype is), natural log
  // [kDecodeBlocks, decode_piece_floats], a workspace of a GPU, uninitialised on entry: what a thread
  // block leaves for the one that merges.
  float* pieces;

  JF2_HOST_DEVICE int rows() const { return shape.query_len * shape.group(); }
  JF2_HOST_DEVICE Band band(int64_t b) const { return band_of(lengths[b]); }
  // Of a sequence whose `lengths` is this.
  JF2_HOST_DEVICE Band band_of(int length) const {
    length = Band::clamp(length, 0, shape.kv_len);
    const int offset = length - shape.query_len;
    return {window_left >= kUnbounded ? INT32_MIN : offset - window_left, offset, shape.query_len,
            length};
  }
  // Row of k and v, as [.., K, H] and [.., K, Hv], with key j of sequence b; -1 if there is no such
  // page.
  JF2_HOST_DEVICE int64_t key_row(int64_t b, int j) const {
    if (pages.table == nullptr) return b * shape.kv_len + j;
    const int page = pages.table[b * pages.per_sequence + j / pages.size];
    if (unsigned(page) >= unsigned(pages.count)) return -1;
    return int64_t{page} * pages.size + j % pages.size;
  }
};

}  // namespace jax_flash2
