// What the backward needs of every query row before its main kernel, for any GPU: D and LSE in base
// 2, and workspaces that start at zero.
//
// One thread block owns kTokenTile rows of one head, padding included; eight threads share a row.
//   1  D = rowsum(dO * O) - dLSE; 0 where the row sees nothing or is padding
//   2  scaled LSE = LSE * log2(e); +inf there, so that exp2(S - LSE) is 0 whatever S is. Or, for the
//      sm_90a kernels, D and LSE / scale as terms (device/row_terms.cuh).
//   3  zeros into the sums of dQ and the semaphores of these rows, and into the queue
#pragma once

#include "core/problem.h"
#include "device/ptx_sm80.cuh"
#include "device/row_terms.cuh"

namespace jax_flash2 {

inline constexpr int kPreprocessThreads = 256;

// Sum of the products of two 16-byte chunks.
template <typename Element>
JF2_DEVICE float dot_chunk(uint4 a, uint4 b) {
  constexpr int kCount = 16 / int(sizeof(Element));
  Element x[kCount], y[kCount];
  memcpy(x, &a, 16);
  memcpy(y, &b, 16);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += float(x[i]) * float(y[i]);
  return sum;
}

template <typename Element, bool kTerms>
__global__ void __launch_bounds__(kPreprocessThreads)
    preprocess_kernel(const __grid_constant__ BackwardProblem problem) {
  constexpr int kRowThreads = 8, kRowsAtOnce = kPreprocessThreads / kRowThreads;
  constexpr int kRows = kTokenTile / kRowsAtOnce;  // of a thread
  constexpr int kChunk = 16 / int(sizeof(Element));
  constexpr float kLog2e = 1.44269504088896f;

  const Shape& shape = problem.shape;
  const int64_t padded_len = round_up(shape.query_len, kTokenTile);
  const unsigned tiles = unsigned(padded_len / kTokenTile);
  const unsigned flat_head = blockIdx.x / tiles;
  const int64_t sequence = flat_head / shape.query_heads;
  const int head = int(flat_head % shape.query_heads);
  const int row0 = int(blockIdx.x % tiles) * kTokenTile;
  const int thread = int(threadIdx.x), first_row = row0 + thread / kRowThreads;
  const Band band = problem.band.at(sequence, shape.query_len, shape.kv_len);

  // 1, 2
  const int64_t stride = int64_t(shape.query_heads) * shape.value_dim;
  const int64_t offset = (sequence * shape.query_len + first_row) * stride + head * shape.value_dim;
  const Element* const out = static_cast<const Element*>(problem.out) + offset;
  const Element* const dout = static_cast<const Element*>(problem.dout) + offset;
  bool sees[kRows];
  float sum[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = first_row + r * kRowsAtOnce;
    sees[r] = i < band.query_length && band.lo(i) < band.hi(i);
  }
  for (int c = thread % kRowThreads * kChunk; c < shape.value_dim; c += kRowThreads * kChunk) {
    uint4 x[kRows] = {}, y[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!sees[r]) continue;
      const int64_t at = r * kRowsAtOnce * stride + c;
      x[r] = *reinterpret_cast<const uint4*>(out + at);
      y[r] = *reinterpret_cast<const uint4*>(dout + at);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] += dot_chunk<Element>(x[r], y[r]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int lane = 1; lane < kRowThreads; lane *= 2) {
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], lane);
    }
    if (thread % kRowThreads != 0) continue;
    const int i = first_row + r * kRowsAtOnce;
    float lse = -INFINITY, dlse = 0.f;
    if (sees[r]) {
      lse = static_cast<const float*>(problem.lse)[flat_head * int64_t(shape.query_len) + i];
      dlse = static_cast<const float*>(problem.dlse)[flat_head * int64_t(shape.query_len) + i];
    }
    const bool counts = lse != -INFINITY;
    const float delta = counts ? sum[r] - dlse : 0.f;
    float* const stats =
        static_cast<float*>(problem.row_stats) + flat_head * kRowStats * padded_len;
    if constexpr (kTerms) {
      char* const tile = reinterpret_cast<char*>(stats) + i / kTermTile * 2 * kTermBytes;
      store_terms(tile, i % kTermTile, counts ? -lse / float(problem.scale) : kHiddenTerm);
      store_terms(tile + kTermBytes, i % kTermTile, -delta);
    } else {
      stats[kDelta * padded_len + i] = delta;
      stats[kScaledLse * padded_len + i] = counts ? lse * kLog2e : INFINITY;
    }
  }

  // 3
  const int64_t padded_row = flat_head * padded_len + row0;
  if (problem.dq_accum != nullptr) {
    const int64_t padded_dim = round_up(shape.head_dim, kHeadDimTile);
    float4* const sums =
        reinterpret_cast<float4*>(static_cast<float*>(problem.dq_accum) + padded_row * padded_dim);
    const int count = kTokenTile / 4 * int(padded_dim);
#pragma unroll 8
    for (int i = thread; i < count; i += kPreprocessThreads) sums[i] = make_float4(0, 0, 0, 0);
  }
  if (problem.semaphores != nullptr && thread < kTokenTile / kSemaphoreRows) {
    problem.semaphores[padded_row / kSemaphoreRows + thread] = 0;
  }
  if (blockIdx.x == 0 && thread == 0) *problem.next_block = 0;
}

}  // namespace jax_flash2
