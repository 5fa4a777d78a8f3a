// What the two backward kernels share: operands, the element-wise steps, the epilogue.
#pragma once

#include "core/problem.h"
#include "device/copy.cuh"
#include "device/hide.cuh"
#include "kernels/sm80/tiles_backward.h"

namespace jax_flash2::sm80 {

// What the launcher derives from a problem.
struct BackwardPlan {
  int blocks;               // key blocks (main kernel) or query blocks (dQ kernel) of a head
  int section;              // heads (over all sequences) that run side by side
  float scale, scale_log2;  // scale_log2 = scale * log2(e)
};

// The block and the head that a thread block works on. Inside a section all heads' block 0 come
// first, then all heads' block 1, ...
struct BackwardWork {
  int block, head, sequence;

  JF2_DEVICE BackwardWork(const BackwardPlan& plan, int heads, int64_t batch, unsigned index) {
    const unsigned all = unsigned(batch) * heads;  // fits: the grid does
    const unsigned first = index / unsigned(plan.section * plan.blocks) * plan.section;
    const unsigned width = min(unsigned(plan.section), all - first);
    const unsigned rest = index - first * plan.blocks;
    block = int(rest / width);
    const unsigned flat_head = first + rest % width;
    sequence = int(flat_head / heads);
    head = int(flat_head % heads);
  }
};

// The rows of one head of a [B, length, heads, cols] array.
template <typename Element, typename Pointer>
JF2_DEVICE GlobalMatrix<Element> head_matrix(Pointer data, int sequence, int length, int heads,
                                             int head, int cols) {
  const int64_t stride = int64_t(heads) * cols;
  return {static_cast<Element*>(data) + int64_t(sequence) * length * stride + int64_t(head) * cols,
          stride, cols};
}

// An operand whose outer pieces of 16 go around the `kStride` warps that share it: warp w has the
// pieces w, w + kStride, ... of the tile. For operands walked over their columns, whose start must
// not share address bits with the steps (any number of pieces a warp will do).
template <int kStride, typename B>
struct Interleaved {
  using Math = typename B::Math;
  B operand;  // begins at piece w

  template <typename Fragment>
  JF2_DEVICE void load(Fragment& f, int outer, int k) const {
    operand.load(f, outer * kStride, k);
  }
};

// S becomes P = exp(scale S - LSE). LSE (in base 2) is that of the lane's rows, +inf where P is 0.
template <int kM, int kN>
JF2_DEVICE void probabilities(Accumulators<kM, kN>& s, const float (&lse)[kM / 8],
                              float scale_log2) {
#pragma unroll
  for (int r = 0; r < kM / 8; ++r)
#pragma unroll
    for (int j = 0; j < kN / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        at(s, r, j, e) = ptx::ex2(fmaf(at(s, r, j, e), scale_log2, -lse[r]));
}

// dP becomes dS = P (dP - D).
template <int kM, int kN>
JF2_DEVICE void score_gradients(Accumulators<kM, kN>& dp, Accumulators<kM, kN>& p,
                                const float (&delta)[kM / 8]) {
#pragma unroll
  for (int r = 0; r < kM / 8; ++r)
#pragma unroll
    for (int j = 0; j < kN / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = at(dp, r, j, e);
        x = at(p, r, j, e) * (x - delta[r]);
      }
}

// dS becomes 0 where P is: a hidden value may be infinite, and 0 times it is not 0.
template <int kM, int kN>
JF2_DEVICE void hide_gradients(Accumulators<kM, kN>& ds, Accumulators<kM, kN>& p) {
#pragma unroll
  for (int r = 0; r < kM / 8; ++r)
#pragma unroll
    for (int j = 0; j < kN / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (at(p, r, j, e) == 0.f) at(ds, r, j, e) = 0.f;
}

// Writes a warp's accumulators, times `scale`, into the tile: rows from `row`, columns interleaved
// with the other warps' as above. Rows outside `live` (rows of the tile) become zeros.
template <int kStride, typename Tile, int kM, int kN>
JF2_DEVICE void store_interleaved(Tile tile, int row, int piece, Accumulators<kM, kN>& c,
                                  float scale, Range live, int lane) {
#pragma unroll
  for (int r = 0; r < kM / 8; ++r) {
    if (contains(live, row + r * 8 + (lane >> 2))) continue;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) at(c, r, j, 0) = at(c, r, j, 1) = 0.f;
  }
#pragma unroll
  for (int n = 0; n < kN / 16; ++n) {
    Accumulators<kM, 16> part;
#pragma unroll
    for (int i = 0; i < kM / 16; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) part.x[i][j][e] = c.x[i][n * 2 + j][e];
    store_accumulators(tile, row, (piece + n * kStride) * 16, part, scale, lane);
  }
}

}  // namespace jax_flash2::sm80
