// Tiles between global and shared memory, by all the threads of a block.
#pragma once

#include "core/mask.h"
#include "device/gemm.cuh"

namespace jax_flash2 {

// A dense [rows, row_stride] matrix in global memory, of which the first `cols` columns of the rows
// in `valid` may be read or written; the rest of a tile is zero.
template <typename Element>
struct GlobalMatrix {
  Element* data;       // of row 0, 16-byte aligned
  int64_t row_stride;  // in elements, a multiple of 16 bytes
  int cols;            // a multiple of 16 bytes
};

// How `kThreads` threads walk a tile in 16-byte chunks: side by side along a panel's row, then down
// the rows, then across the panels. Only (row, col) of the first chunk depends on the thread; every
// other offset is a constant.
template <int kThreads, typename Tile>
struct ChunkWalk {
  static constexpr int kChunk = 16 / int(sizeof(typename Tile::Element));
  static constexpr int kPanelCols = Tile::kPanelBytes / int(sizeof(typename Tile::Element));
  static constexpr int kChunksPerRow = Tile::kPanelBytes / 16;
  static constexpr int kRowStep = kThreads / kChunksPerRow;
  static_assert(kThreads % kChunksPerRow == 0, "a row of a panel must not straddle two steps");

  int row, col;
  JF2_DEVICE explicit ChunkWalk(int thread)
      : row(int(unsigned(thread) / kChunksPerRow)),
        col(int(unsigned(thread) % kChunksPerRow * kChunk)) {}
};

JF2_DEVICE bool contains(Range range, int i) {
  return unsigned(i - range.begin) < unsigned(range.end - range.begin);
}

// Reads tiles of a matrix into shared memory, one after the other, with cp.async. A thread keeps
// one pointer and moves it, so that few registers last from one tile to the next.
template <int kThreads, typename Tile>
class TileReader {
 public:
  using Element = typename Tile::Element;

  // Stands at rows [row, row + kRows).
  JF2_DEVICE TileReader(GlobalMatrix<const Element> source, int row, int thread)
      : walk_(thread), cols_(source.cols), row_(row), stride_(source.row_stride) {
    from_ = source.data + (row + walk_.row) * source.row_stride + walk_.col;
  }
  JF2_DEVICE void move(int rows) {
    row_ += rows;
    from_ += rows * stride_;
  }
  JF2_DEVICE int row() const { return row_; }

  // Starts the copy; the caller commits and waits. Rows outside `valid` and columns past those of
  // the matrix become zeros: nothing that is hidden from every row of the product enters it, so
  // that NaN in padding cannot reach a result as 0 * NaN.
  JF2_DEVICE void load(Tile tile, Range valid) const {
    static_assert(Walk::kRowStep % 8 == 0, "the swizzle must not change from step to step");
    const uint32_t to = tile.address(walk_.row, walk_.col);
#pragma unroll
    for (int r = 0; r < Tile::kRows; r += Walk::kRowStep) {
      if (Tile::kRows % Walk::kRowStep != 0 && walk_.row + r >= Tile::kRows) break;
      const bool row_inside = contains(valid, row_ + walk_.row + r);
      // Opaque, so that the panels become immediate offsets to one address.
      const Element* const from = ptx::opaque(from_ + r * stride_);
#pragma unroll
      for (int c = 0; c < Tile::kCols; c += Walk::kPanelCols) {
        const bool inside = row_inside && walk_.col + c < cols_;
        ptx::cp_async_16(Tile::step(to, r, c), from + c, inside ? 16 : 0);
      }
    }
  }

 private:
  using Walk = ChunkWalk<kThreads, Tile>;

  Walk walk_;
  int cols_, row_;
  int64_t stride_;
  const Element* from_;
};

// Starts the copy of rows [row, row + kRows) into the tile; see TileReader.
template <int kThreads, typename Tile, typename Element>
JF2_DEVICE void load_tile(Tile tile, GlobalMatrix<const Element> source, int row, Range valid,
                          int thread) {
  TileReader<kThreads, Tile>(source, row, thread).load(tile, valid);
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

// Copies rows [tile_row, tile_row + kRows) of the tile out to rows [row, row + kRows), leaving rows
// outside `valid` untouched.
template <int kThreads, int kRows, typename Tile, typename Element>
JF2_DEVICE void store_rows(GlobalMatrix<Element> target, Tile tile, int tile_row, int row,
                           Range valid, int thread) {
  using Walk = ChunkWalk<kThreads, Tile>;
  const Walk walk(thread);
#pragma unroll
  for (int r = 0; r < kRows; r += Walk::kRowStep) {
    if (kRows % Walk::kRowStep != 0 && walk.row + r >= kRows) break;
    const int global_row = row + walk.row + r;
#pragma unroll
    for (int c = 0; c < Tile::kCols; c += Walk::kPanelCols) {
      if (contains(valid, global_row) && walk.col + c < target.cols) {
        *reinterpret_cast<uint4*>(target.data + global_row * target.row_stride + walk.col + c) =
            ptx::lds_128(tile.address(tile_row + walk.row + r, walk.col + c));
      }
    }
  }
}

// Copies the whole tile out to rows [row, row + kRows), leaving rows outside `valid` untouched.
template <int kThreads, typename Tile, typename Element>
JF2_DEVICE void store_tile(GlobalMatrix<Element> target, Tile tile, int row, Range valid,
                           int thread) {
  store_rows<kThreads, Tile::kRows>(target, tile, 0, row, valid, thread);
}

}  // namespace jax_flash2
