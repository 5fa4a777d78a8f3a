// What the backward needs of every query row before its main kernel, for any GPU: D and LSE in base
// 2, and workspaces that start at zero.
//
// One thread block owns 32 rows of one head, padding included; eight threads share a row.
//   1  zeros into the sums of dQ and the semaphores of these rows, and into the queues
//   2  D = rowsum(dO * O) - dLSE; 0 where the row sees nothing or is padding
//   3  scaled LSE = LSE * log2(e); +inf there, so that exp2(S - LSE) is 0 whatever S is. Or, for the
//      sm_90a kernels, D and LSE / scale as terms (device/row_terms.cuh).
#pragma once

#include "core/problem.h"
#include "device/ptx_sm80.cuh"
#include "device/row_terms.cuh"

namespace jax_flash2 {

inline constexpr int kPreprocessRows = 32, kPreprocessRowThreads = 8;
inline constexpr int kPreprocessThreads = kPreprocessRows * kPreprocessRowThreads;
static_assert(kTokenTile % kPreprocessRows == 0 && kPreprocessRows % kSemaphoreRows == 0,
              "a thread block stays inside one head");

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
  constexpr int kChunk = 16 / int(sizeof(Element));
  constexpr float kLog2e = 1.44269504088896f;

  const Shape& shape = problem.shape;
  const int64_t padded_len = round_up(shape.query_len, kTokenTile);
  const unsigned blocks = unsigned(padded_len / kPreprocessRows);  // of a head
  // Backwards: what the main kernel begins with is in L2 then.
  const unsigned block = gridDim.x - 1 - blockIdx.x, flat_head = block / blocks;
  const int64_t sequence = flat_head / shape.query_heads;
  const int head = int(flat_head % shape.query_heads);
  const int first_row = int(block % blocks) * kPreprocessRows;
  const int thread = int(threadIdx.x), part = thread % kPreprocessRowThreads;
  const int row = first_row + thread / kPreprocessRowThreads;
  const Band band = problem.band.at(sequence, shape.query_len, shape.kv_len);
  const bool sees = row < band.query_length && band.lo(row) < band.hi(row);

  float lse = -INFINITY, dlse = 0.f;
  if (sees) {
    const int64_t at = flat_head * int64_t(shape.query_len) + row;
    lse = static_cast<const float*>(problem.lse)[at];
    dlse = static_cast<const float*>(problem.dlse)[at];
  }

  // 1
  const int64_t padded_row = flat_head * padded_len + first_row;
  if (problem.dq_accum != nullptr) {
    const int64_t padded_dim = round_up(shape.head_dim, kHeadDimTile);
    float4* const sums =
        reinterpret_cast<float4*>(static_cast<float*>(problem.dq_accum) + padded_row * padded_dim);
    const int count = kPreprocessRows / 4 * int(padded_dim);
#pragma unroll 4
    for (int i = thread; i < count; i += kPreprocessThreads) sums[i] = make_float4(0, 0, 0, 0);
  }
  if (problem.semaphores != nullptr && thread < kPreprocessRows / kSemaphoreRows) {
    problem.semaphores[padded_row / kSemaphoreRows + thread] = 0;
  }
  if (blockIdx.x == 0 && thread < kQueues) problem.queues[thread] = 0;

  // 2
  float sum = 0.f;
  if (sees) {
    const int64_t offset =
        ((sequence * shape.query_len + row) * shape.query_heads + head) * shape.value_dim;
    const Element* const out = static_cast<const Element*>(problem.out) + offset;
    const Element* const dout = static_cast<const Element*>(problem.dout) + offset;
#pragma unroll 2
    for (int c = part * kChunk; c < shape.value_dim; c += kPreprocessRowThreads * kChunk) {
      sum += dot_chunk<Element>(*reinterpret_cast<const uint4*>(out + c),
                                *reinterpret_cast<const uint4*>(dout + c));
    }
  }
#pragma unroll
  for (int lane = 1; lane < kPreprocessRowThreads; lane *= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  const bool counts = lse != -INFINITY;
  const float delta = counts ? sum - dlse : 0.f;

  // 3
  float* const stats = static_cast<float*>(problem.row_stats) + flat_head * kRowStats * padded_len;
  if constexpr (kTerms) {
    if (part >= 2) return;  // the first thread of a row has LSE, the second D
    char* const tile = reinterpret_cast<char*>(stats) + row / kTermTile * 2 * kTermBytes;
    const float minus_lse = counts ? -lse / float(problem.scale) : kHiddenTerm;
    store_terms(tile + part * kTermBytes, row % kTermTile, part == 0 ? minus_lse : -delta);
  } else {
    if (part >= 1) return;
    stats[kDelta * padded_len + row] = delta;
    stats[kScaledLse * padded_len + row] = counts ? lse * kLog2e : INFINITY;
  }
}

}  // namespace jax_flash2
