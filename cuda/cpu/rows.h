// Rows of a key/value head (kernels.h) and where they lie in the arrays.
#pragma once

#include "cpu/kernels.h"
#include "cpu/pack.h"

namespace jax_flash2::cpu {
namespace {

inline constexpr double kLog2E = 1.4426950408889634074;

template <class T>
JF2_INLINE T min(T a, T b) {
  return b < a ? b : a;
}

// Addresses and masks of one key/value head.
class HeadView {
 public:
  HeadView(const Shape& shape, DType dtype, const BandSpec& band, Head head)
      : HeadView(shape, dtype, band.at(head.b, shape.query_len, shape.kv_len), head) {}
  HeadView(const Shape& shape, DType dtype, const Band& band, Head head)
      : shape_(shape), dtype_(dtype), head_(head), group_(shape.group()), band_(band) {}

  const Band& band() const { return band_; }
  DType dtype() const { return dtype_; }

  int token(int64_t row) const { return static_cast<int>(row / group_); }
  Range tokens(Rows rows) const { return {token(rows.begin), token(rows.end - 1) + 1}; }
  int64_t num_rows() const { return int64_t{shape_.query_len} * group_; }
  // Keys that the row sees.
  Range keys(int64_t row) const {
    const int i = token(row);
    if (i >= band_.query_length || band_.lo(i) >= band_.hi(i)) return {0, 0};
    return {band_.lo(i), band_.hi(i)};
  }

  // Index of the row in an array [B, T, N, width], of the key in [B, S, K, width].
  int64_t row_index(int64_t row, int width) const {
    return ((head_.b * shape_.query_len + token(row)) * shape_.query_heads + query_head(row)) *
           width;
  }
  int64_t key_index(int key, int width) const {
    return ((head_.b * shape_.kv_len + key) * shape_.kv_heads + head_.k) * width;
  }
  // Index of the row in an array [B, N, tokens].
  int64_t statistic_index(int64_t row, int64_t tokens) const {
    return (head_.b * shape_.query_heads + query_head(row)) * tokens + token(row);
  }
  // Index of the row in an array [B, N, kRowStats, tokens].
  int64_t row_stat_index(int64_t row, RowStat stat, int64_t tokens) const {
    const int64_t head = head_.b * shape_.query_heads + query_head(row);
    return (head * kRowStats + stat) * tokens + token(row);
  }

 private:
  int query_head(int64_t row) const { return head_.k * group_ + static_cast<int>(row % group_); }

  const Shape& shape_;
  DType dtype_;
  Head head_;
  int group_;
  Band band_;
};

// Where the band hides it, score (row, key) becomes `hidden`. Scores are transposed: [key][row], so
// that lo and hi, the keys each row sees, are vectors.
template <class R>
void mask_transposed(R* scores, Range keys, int columns, const LaneInt<R>* lo, const LaneInt<R>* hi,
                     R hidden) {
  for (int j = 0; j < columns; j += kLanes<R>) {
    const Vec<LaneInt<R>> first = load(lo + j), end = load(hi + j);
    for (int k = keys.begin; k < keys.end; ++k) {
      R* at = scores + (k - keys.begin) * kScorePitch + j;
      const Vec<LaneInt<R>> key = splat(LaneInt<R>(k));
      const auto allowed = (key >= first) & (key < end);
      store(at, allowed ? load(at) : splat(hidden));
    }
  }
}

}  // namespace
}  // namespace jax_flash2::cpu
