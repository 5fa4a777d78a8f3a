// Tiles between global and shared memory, by all the threads of a block.
#pragma once

#include "core/mask.h"
#include "device/gemm.cuh"

namespace jax_flash2 {

// A dense [rows, row_stride] matrix in global memory, of which the first `cols` columns of the rows in
// `valid` may be read or written; the rest of a tile is zero.
template <typename Element>
struct GlobalMatrix {
  Element* data;       // of row 0, 16-byte aligned
  int64_t row_stride;  // in elements, a multiple of 16 bytes
  int cols;            // a multiple of 16 bytes
};

// Starts the copy of rows [row, row + kRows) into the tile with cp.async; the caller commits and waits.
// Rows outside `valid` and columns past `cols` become zeros: nothing that is hidden from every row of
// the product enters it, so that NaN in padding cannot reach a result as 0 * NaN.
template <int kThreads, typename Tile, typename Element>
JF2_DEVICE void load_tile(Tile tile, GlobalMatrix<const Element> source, int row, Range valid,
                          int thread) {
  constexpr int kChunk = 16 / sizeof(Element), kChunksPerRow = Tile::kCols / kChunk;
  constexpr int kChunks = Tile::kRows * kChunksPerRow;
#pragma unroll
  for (int first = 0; first < kChunks; first += kThreads) {
    const int i = first + thread;
    if (kChunks % kThreads != 0 && i >= kChunks) break;
    const int r = i / kChunksPerRow, c = i % kChunksPerRow * kChunk;
    const int global_row = row + r;
    const bool inside = global_row >= valid.begin && global_row < valid.end && c < source.cols;
    const Element* from = source.data + (inside ? global_row * source.row_stride + c : 0);
    ptx::cp_async_16(tile.address(r, c), from, inside ? 16 : 0);
  }
}

// Writes a warp's accumulators, times `scale`, into the tile at (row, col) as its element type.
template <typename Tile, int kM, int kN>
JF2_DEVICE void store_accumulators(Tile tile, int row, int col, const Accumulators<kM, kN>& c,
                                   float scale, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < kM / 16; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t base = tile.address(row + i * 16 + half * 8 + g, col + 2 * t);
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        const float x = c.x[i][j][half * 2] * scale, y = c.x[i][j][half * 2 + 1] * scale;
        const uint32_t a = Tile::step(base, 0, j * 8);
        if constexpr (sizeof(typename Tile::Element) == 4) {
          ptx::sts_f32x2(a, x, y);
        } else {
          ptx::sts_32(a, pack2<typename Tile::Element>(x, y));
        }
      }
    }
  }
}

// Copies the tile out to rows [row, row + kRows), leaving rows outside `valid` untouched.
template <int kThreads, typename Tile, typename Element>
JF2_DEVICE void store_tile(GlobalMatrix<Element> target, Tile tile, int row, Range valid, int thread) {
  constexpr int kChunk = 16 / sizeof(Element), kChunksPerRow = Tile::kCols / kChunk;
  constexpr int kChunks = Tile::kRows * kChunksPerRow;
#pragma unroll
  for (int first = 0; first < kChunks; first += kThreads) {
    const int i = first + thread;
    if (kChunks % kThreads != 0 && i >= kChunks) break;
    const int r = i / kChunksPerRow, c = i % kChunksPerRow * kChunk;
    const int global_row = row + r;
    if (global_row >= valid.begin && global_row < valid.end && c < target.cols) {
      *reinterpret_cast<uint4*>(target.data + global_row * target.row_stride + c) =
          ptx::lds_128(tile.address(r, c));
    }
  }
}

}  // namespace jax_flash2
