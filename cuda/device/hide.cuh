// Hiding what the band hides, in accumulators: of mma.sync and of wgmma, which lay out a warp's rows
// alike.
#pragma once

#include "core/mask.h"
#include "device/gemm.cuh"

namespace jax_flash2 {

// Of one row, a lane holds columns 8j and 8j + 1 for all j, counted from its first. Those outside
// `seen`, counted likewise, become `hidden`; `at(j, e)` is where column 8j + e is held.
template <int kColumns, typename At>
JF2_DEVICE void hide_in_row(Range seen, float hidden, const At& at) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (j * 8 + e < seen.begin || j * 8 + e >= seen.end) at(j, e) = hidden;
}

// The keys that row i sees, counted from a lane's first column of accumulators that begin at `key`.
JF2_DEVICE Range seen_by(const Band& band, int i, int key, int lane) {
  const int first = key + (lane & 3) * 2;
  return {band.lo(i) - first, band.hi(i) - first};
}

// Scores, or anything laid out so, that begin at query row `row` and key `key`.
template <int kM, int kN>
JF2_DEVICE void hide(Accumulators<kM, kN>& c, const Band& band, int row, int key, float hidden,
                     int lane) {
  // The ranges of the rows do not change from tile to tile, and must not occupy registers in
  // between.
  const int lane_row = ptx::opaque(row + (lane >> 2));
#pragma unroll
  for (int r = 0; r < kM / 8; ++r)
    hide_in_row<kN>(seen_by(band, lane_row + r * 8, key, lane), hidden,
                    [&](int j, int e) -> float& { return at(c, r, j, e); });
}

}  // namespace jax_flash2
