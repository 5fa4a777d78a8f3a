// Shared memory as the copy engine and wgmma see it: panels of 64 16-bit columns (128 bytes) in the
// 128-byte swizzle, all rows of a panel one after the other.
#pragma once

#include "device/ptx_sm90.cuh"

namespace jax_flash2 {

inline constexpr int kPanelCols = 64, kPanelRowBytes = 128;

// kRows x kCols elements of 16 bits, kCols rounded up to whole panels.
template <int kRows_, int kCols_>
struct PanelTile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kPanels = (kCols + kPanelCols - 1) / kPanelCols;
  static constexpr int kPanelBytes = kRows * kPanelRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static_assert(kRows % 8 == 0, "the swizzle repeats every 8 rows");

  uint32_t base;  // shared address, aligned to 1024 bytes

  JF2_DEVICE uint32_t address(int row, int col) const {
    return base + (col / kPanelCols) * kPanelBytes + row * kPanelRowBytes +
           (((col % kPanelCols) * 2) ^ ((row & 7) * 16));
  }
  // Descriptors of the operand that begins at row `row` (a multiple of 8) and covers 16 values of k.
  // K-major: rows are m or n, columns k; k a multiple of 16.
  JF2_DEVICE uint64_t k_major(int row, int k) const {
    return ptx::matrix_descriptor(base + (k / kPanelCols) * kPanelBytes + row * kPanelRowBytes +
                                      (k % kPanelCols) * 2,
                                  16, 8 * kPanelRowBytes, ptx::Swizzle::k128B);
  }
  // Outer-major: rows are k, columns m or n, all of them.
  JF2_DEVICE uint64_t outer_major(int k) const {
    return ptx::matrix_descriptor(base + k * kPanelRowBytes, kPanelBytes, 8 * kPanelRowBytes,
                                  ptx::Swizzle::k128B);
  }
};

}  // namespace jax_flash2
