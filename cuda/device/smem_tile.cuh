// A swizzled matrix in shared memory.
//
// Columns are cut into panels of 128 bytes (64 where 128 do not divide a row); a panel holds all
// rows, one after the other. Inside a row of a panel the 16-byte chunks are permuted by the row, so
// that the eight rows that an ldmatrix reads at once, or the accesses of the float32 fragments,
// fall into different banks:
//   16-bit, 128-byte panels   chunk ^ (row % 8)
//   16-bit,  64-byte panels   chunk ^ (row / 2 % 4)
//   float32                   chunk ^ 2 * ((row % 8 + row % 8 / 4) % 4): pairs of chunks stay
//   together,
//                             rows {0..3}, {4..7}, the even and the odd ones all differ
// The permutation is an exclusive-or with bits that repeat every 8 rows, so stepping by multiples
// of 16 rows adds a constant, and stepping over columns is one exclusive-or with a constant.
#pragma once

#include "device/ptx_sm80.cuh"

namespace jax_flash2 {

template <typename Element_, int kRows_, int kCols_>
struct SmemTile {
  using Element = Element_;
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kRowBytes = kCols * int(sizeof(Element));
  static constexpr int kPanelBytes = kRowBytes % 128 == 0 ? 128 : 64;
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kRowBytes % kPanelBytes == 0, "a row must be whole panels of 64 or 128 bytes");
  static_assert(kRows % 8 == 0, "the swizzle repeats every 8 rows");
  static_assert(sizeof(Element) == 2 || kPanelBytes == 128, "float32 rows are panels of 128 bytes");

  uint32_t base;  // shared address, aligned to 1024 bytes

  static JF2_DEVICE uint32_t swizzle(int row) {
    const int r = row & 7;
    if constexpr (sizeof(Element) == 4) return ((r + (r >> 2)) & 3) * 32;
    return kPanelBytes == 128 ? r * 16 : (r >> 1) * 16;
  }
  // Address of (row, col).
  JF2_DEVICE uint32_t address(int row, int col) const {
    const uint32_t byte = col * sizeof(Element);
    return base + (byte / kPanelBytes) * (kRows * kPanelBytes) + row * kPanelBytes +
           ((byte % kPanelBytes) ^ swizzle(row));
  }
  // The address `rows` (a multiple of 8) and `cols` away from `address`, both known at compile
  // time; the bits of `cols` must be clear in the column of `address`.
  static JF2_DEVICE uint32_t step(uint32_t address, int rows, int cols) {
    const uint32_t byte = cols * sizeof(Element);
    return (address ^ (byte % kPanelBytes)) + (byte / kPanelBytes) * (kRows * kPanelBytes) +
           rows * kPanelBytes;
  }
};

}  // namespace jax_flash2
