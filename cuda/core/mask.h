// The band: the one mask policy. Floor 0: plain C++ that nvcc compiles for the device too.
//
// Causal, window, offset and lengths are one thing: query row i sees keys lo(i) <= j < hi(i), and
// both ends never decrease with i. The forward, the backward and the CPU handlers ask this file
// alone which keys a tile must load, whether a tile is partial, and whether (i, j) is allowed.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define JF2_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JF2_HOST_DEVICE inline
#endif

namespace jax_flash2 {

// A band edge at or past this distance hides nothing. Token counts and finite distances stay below
// it (jax_flash2/_spec.py), so that sums of two of them fit an int32.
inline constexpr int kUnbounded = 1 << 29;
// The longest sequence: i + offset + window then stays inside an int32.
inline constexpr int kMaxLength = 1 << 28;

// A half-open range of rows or keys; empty when end <= begin.
struct Range {
  int begin, end;
  JF2_HOST_DEVICE bool empty() const { return end <= begin; }
};

// The run-time part of the mask, one record a sequence: operand `bounds`, int32 [B, 3].
struct Bounds {
  int32_t query_offset;  // position of query 0 among the keys, added to the static band
  int32_t query_length;  // rows at or past it are padding
  int32_t kv_length;     // keys at or past it are padding
};
static_assert(sizeof(Bounds) == 12, "Bounds mirrors a row of the int32 [B, 3] operand");

// The mask of one sequence.
struct Band {
  int lower, upper;  // j - i in [lower, upper], offset included; see unbounded()
  int query_length, kv_length;

  static JF2_HOST_DEVICE int clamp(int x, int low, int high) {
    return x < low ? low : (x > high ? high : x);
  }
  JF2_HOST_DEVICE bool lower_unbounded() const { return lower == INT32_MIN; }
  JF2_HOST_DEVICE bool upper_unbounded() const { return upper == INT32_MAX; }

  // First key and one past the last key that row i sees; i in [0, query_length).
  JF2_HOST_DEVICE int lo(int i) const {
    return lower_unbounded() ? 0 : clamp(i + lower, 0, kv_length);
  }
  JF2_HOST_DEVICE int hi(int i) const {
    return upper_unbounded() ? kv_length : clamp(i + upper + 1, 0, kv_length);
  }
  JF2_HOST_DEVICE bool allowed(int i, int j) const {
    return i < query_length && j >= lo(i) && j < hi(i);
  }

  // Keys that any of the rows sees: what a query tile has to load. Empty if no row sees any.
  JF2_HOST_DEVICE Range keys_of(Range rows) const {
    const int last = (rows.end < query_length ? rows.end : query_length) - 1;
    if (last < rows.begin) return {0, 0};
    const Range keys = {lo(rows.begin), hi(last)};
    return keys.empty() ? Range{0, 0} : keys;
  }
  // Rows that see any of the keys: what a key tile has to visit. Empty if no row sees any.
  JF2_HOST_DEVICE Range rows_of(Range keys) const {
    const int last = (keys.end < kv_length ? keys.end : kv_length) - 1;
    if (last < keys.begin) return {0, 0};
    const Range rows = {
        upper_unbounded() ? 0 : clamp(keys.begin - upper, 0, query_length),
        lower_unbounded() ? query_length : clamp(last - lower + 1, 0, query_length)};
    return rows.empty() ? Range{0, 0} : rows;
  }
  // Keys that all of the rows see, but for rows past the query length. Empty if no key is.
  JF2_HOST_DEVICE Range keys_seen_by_all(Range rows) const {
    const int last = (rows.end < query_length ? rows.end : query_length) - 1;
    if (last < rows.begin) return {0, 0};
    const Range keys = {lo(last), hi(rows.begin)};
    return keys.empty() ? Range{0, 0} : keys;
  }
  // Rows that see all of the keys. Empty if no row does.
  JF2_HOST_DEVICE Range rows_seeing_all(Range keys) const {
    if (keys.end > kv_length) return {0, 0};
    const Range rows = {
        upper_unbounded() ? 0 : clamp(keys.end - 1 - upper, 0, query_length),
        lower_unbounded() ? query_length : clamp(keys.begin - lower + 1, 0, query_length)};
    return rows.empty() ? Range{0, 0} : rows;
  }
  // True if every row of the tile sees every key of the tile: no masking needed inside it.
  JF2_HOST_DEVICE bool covers(Range rows, Range keys) const {
    return rows.end <= query_length && lo(rows.end - 1) <= keys.begin && hi(rows.begin) >= keys.end;
  }
};

// The band's static half plus the operand, before a sequence is chosen.
struct BandSpec {
  int lower, upper;      // distances j - i; |x| >= kUnbounded hides nothing
  const Bounds* bounds;  // [B] or null: offset 0 and full lengths

  // The mask of sequence `b`, its lengths clamped into the buffers [0, T] and [0, S].
  JF2_HOST_DEVICE Band at(int64_t b, int query_capacity, int kv_capacity) const {
    Bounds r = {0, query_capacity, kv_capacity};
    if (bounds != nullptr) r = bounds[b];
    const int offset = Band::clamp(r.query_offset, -kUnbounded, kUnbounded);
    return {lower <= -kUnbounded ? INT32_MIN : lower + offset,
            upper >= kUnbounded ? INT32_MAX : upper + offset,
            Band::clamp(r.query_length, 0, query_capacity),
            Band::clamp(r.kv_length, 0, kv_capacity)};
  }
};

}  // namespace jax_flash2
