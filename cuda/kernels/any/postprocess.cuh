// The backward's last step, for any GPU: dQ = scale * the float32 sums, in the element type.
//
// A warp owns 16 query rows of one head. Eight pieces of the sums at a time, 64 columns, go through
// shared memory into rows.
#pragma once

#include "core/problem.h"
#include "device/copy.cuh"
#include "device/dq_accum.cuh"

namespace jax_flash2 {

inline constexpr int kPostprocessWarps = 8;
static_assert(kTokenTile % (kPostprocessWarps * 16) == 0, "a thread block stays inside one head");

template <typename Element>
__global__ void __launch_bounds__(kPostprocessWarps * 32)
    postprocess_kernel(const __grid_constant__ BackwardProblem problem, float scale) {
  using Tile = SmemTile<Element, 16, kHeadDimTile>;
  constexpr int kRows = kPostprocessWarps * 16;
  __shared__ __align__(1024) unsigned char buffer[kPostprocessWarps * Tile::kBytes];

  const Shape& shape = problem.shape;
  const int64_t padded_len = round_up(shape.query_len, kTokenTile);
  const unsigned tiles = unsigned(padded_len / kRows);
  // Backwards: what the main kernel ended with is in L2 still.
  const unsigned block = gridDim.x - 1 - blockIdx.x, flat_head = block / tiles;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int row = int(block % tiles) * kRows + warp * 16;
  if (row >= shape.query_len) return;

  const Tile tile = {ptx::shared_address(buffer) + warp * Tile::kBytes};
  const int64_t padded_row = flat_head * padded_len + row;
  const float* const sums = dq_lane(
      static_cast<float*>(problem.dq_accum) + padded_row * round_up(shape.head_dim, kHeadDimTile),
      lane);
  const int64_t sequence = flat_head / shape.query_heads;
  // A row that sees nothing has no gradient, even where its tile saw an infinite key.
  const Band band = problem.band.at(sequence, shape.query_len, shape.kv_len);
  bool sees[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = row + lane / 4 + half * 8;
    sees[half] = i < band.query_length && band.lo(i) < band.hi(i);
  }

  const int head = int(flat_head % shape.query_heads);
  const int64_t stride = int64_t(shape.query_heads) * shape.head_dim;
  Element* const dq = static_cast<Element*>(problem.dq) + sequence * shape.query_len * stride +
                      head * shape.head_dim;
  for (int col = 0; col < shape.head_dim; col += kHeadDimTile) {
    Accumulators<16, kHeadDimTile> c;
#pragma unroll
    for (int j = 0; j < kHeadDimTile / 8; ++j) {
      read_dq(sums + (col / 8 + j) * kDqPiece, c.x[0][j]);
    }
#pragma unroll
    for (int j = 0; j < kHeadDimTile / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) c.x[0][j][e] = sees[e / 2] ? c.x[0][j][e] : 0.f;
    __syncwarp();  // every lane has read the columns before these
    store_accumulators(tile, 0, 0, c, scale, lane);
    __syncwarp();
    const GlobalMatrix<Element> target = {dq + col, stride,
                                          min(shape.head_dim - col, kHeadDimTile)};
    store_tile<32>(target, tile, row, {0, shape.query_len}, lane);
  }
}

}  // namespace jax_flash2
