// From accumulators of wgmma straight to rows of global memory, 16 bytes a lane.
#pragma once

#include <cstdint>

#include "device/ptx_sm80.cuh"

namespace jax_flash2 {

// The lanes of a quad exchange registers: lane t gets x[t] of each, 16 contiguous bytes of a row.
JF2_DEVICE void transpose_quad(uint32_t (&x)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t y = __shfl_xor_sync(~0u, odd ? x[i] : x[i + 1], 1);
    (odd ? x[i] : x[i + 1]) = y;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t y = __shfl_xor_sync(~0u, high ? x[i] : x[i + 2], 2);
    (high ? x[i] : x[i + 2]) = y;
  }
}

// Rows g and g + 8 of a warp's 16, g = lane / 4, of 16-bit elements: `to` is row g, of which there are
// `rows` from there on, `cols` wide. pair(j, half) gives this lane's elements of the 8 columns from 8 j
// on, of row g + 8 half.
template <int kColumnGroups, typename Element, typename Pair>
JF2_DEVICE void store_rows(Element* to, int64_t stride, int rows, int cols, int lane,
                           const Pair& pair) {
  static_assert(sizeof(Element) == 2 && kColumnGroups % 4 == 0);
#pragma unroll
  for (int j = 0; j < kColumnGroups; j += 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t x[4] = {pair(j, half), pair(j + 1, half), pair(j + 2, half), pair(j + 3, half)};
      transpose_quad(x, lane);
      const int column = (j + (lane & 3)) * 8;
      if (half * 8 < rows && column < cols)
        *reinterpret_cast<uint4*>(to + half * 8 * stride + column) =
            make_uint4(x[0], x[1], x[2], x[3]);
    }
  }
}

}  // namespace jax_flash2
