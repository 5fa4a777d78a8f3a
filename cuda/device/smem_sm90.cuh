// Shared memory as the copy engine and wgmma see it: panels of 64 16-bit columns (128 bytes) in the
// 128-byte swizzle, all rows of a panel one after the other.
#pragma once

#include "core/mask.h"
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
  // From an address in a row's first 16 columns to the one `columns` (a multiple of 16) further on.
  static JF2_DEVICE uint32_t further(uint32_t address, int columns) {
    return (address ^ (columns % kPanelCols * 2)) + columns / kPanelCols * kPanelBytes;
  }
  // The tile as an operand of wgmma: the low word of its descriptor (address and leading offset,
  // both in units of 16 bytes; ptx_wgmma.cuh adds the high one). What the operand begins with moves
  // by an offset. K-major: rows are m or n, columns k.
  JF2_DEVICE uint32_t k_major() const { return base >> 4 | 1 << 16; }
  // To row `row` (a multiple of 8) and the 16 values of k from `k` (a multiple of 16).
  static JF2_DEVICE uint32_t k_major_offset(int row, int k) {
    return ((k / kPanelCols) * kPanelBytes + row * kPanelRowBytes + (k % kPanelCols) * 2) >> 4;
  }
  // Outer-major: rows are k, columns m or n, all of them, a panel every kPanelBytes.
  JF2_DEVICE uint32_t outer_major() const { return base >> 4 | (kPanelBytes >> 4) << 16; }
  static JF2_DEVICE uint32_t outer_major_offset(int k) { return (k * kPanelRowBytes) >> 4; }
  // To the columns from `column` (a multiple of 64) on.
  static JF2_DEVICE uint32_t outer_major_column(int column) {
    return (column / kPanelCols) * (kPanelBytes >> 4);
  }
};

// Rows of one head, all panels of the tile, kUnroll of them a turn of the loop.
template <int kUnroll = 1, typename Tile>
JF2_DEVICE void load_rows(Tile tile, const CUtensorMap* map, uint32_t full, int head, int row,
                          int batch) {
#pragma unroll kUnroll
  for (int panel = 0; panel < Tile::kPanels; ++panel)
    ptx::tma_load_4d(tile.base + panel * Tile::kPanelBytes, map, full, panel * kPanelCols, head,
                     row, batch);
}

// Zeroes the rows of a tile of K or V at `key` that no query of the sequence sees, by one warp: 0 * NaN
// would reach a sum over the keys.
template <typename Tile>
JF2_DEVICE void clear_hidden_rows(Tile tile, int key, Range visible, int lane) {
#pragma unroll 1
  for (int i = lane; i < Tile::kBytes / 8; i += 32) {
    const int row = i / (Tile::kBytes / Tile::kRows / 8),
              column = i % (Tile::kBytes / Tile::kRows / 8) * 4;
    if (key + row < visible.begin || key + row >= visible.end)
      ptx::sts_f32x2(tile.address(row, column), 0.f, 0.f);
  }
  ptx::fence_proxy_async();
  __syncwarp();
}

}  // namespace jax_flash2
