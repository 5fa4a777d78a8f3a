// dK and dV where several thread blocks had a part of a group's query heads each: the sum of their
// shares, always in the same order, in the element type. For any GPU.
//
// A share's rows are the (key, K/V head) pairs of a sequence, dK and dV side by side. A thread block
// owns kSumRows of them, a thread eight columns at a time.
#pragma once

#include <cstring>

#include "core/problem.h"
#include "device/ptx_sm80.cuh"

namespace jax_flash2 {

inline constexpr int kSumRows = 32, kSumThreads = 256;

template <typename Element>
__global__ void __launch_bounds__(kSumThreads)
    sum_dkv_kernel(const __grid_constant__ BackwardProblem problem) {
  constexpr int kChunk = 8, kWords = kChunk * int(sizeof(Element)) / 16;
  const Shape& shape = problem.shape;
  const int64_t rows = int64_t(shape.kv_len) * shape.kv_heads;  // of a sequence
  const unsigned tiles = unsigned(round_up(rows, kSumRows) / kSumRows);
  const int64_t sequence = blockIdx.x / tiles;
  const int64_t row0 = int64_t(blockIdx.x % tiles) * kSumRows;
  const int live_rows = int(min(int64_t(kSumRows), rows - row0));
  const int chunks = (shape.head_dim + shape.value_dim) / kChunk;
  const int64_t share = rows * chunks * kChunk;  // floats from one share to the next
  const float* const first =
      problem.dkv_partial + sequence * problem.group_splits * share + row0 * chunks * kChunk;
  Element* const dk = static_cast<Element*>(problem.dk) + (sequence * rows + row0) * shape.head_dim;
  Element* const dv =
      static_cast<Element*>(problem.dv) + (sequence * rows + row0) * shape.value_dim;

  for (int i = int(threadIdx.x); i < live_rows * chunks; i += kSumThreads) {
    float sum[kChunk] = {};
    const float* from = first + i * kChunk;
#pragma unroll 4
    for (int split = 0; split < problem.group_splits; ++split, from += share) {
      const float4 a = *reinterpret_cast<const float4*>(from);
      const float4 b = *reinterpret_cast<const float4*>(from + 4);
      sum[0] += a.x, sum[1] += a.y, sum[2] += a.z, sum[3] += a.w;
      sum[4] += b.x, sum[5] += b.y, sum[6] += b.z, sum[7] += b.w;
    }
    Element rounded[kChunk];
#pragma unroll
    for (int e = 0; e < kChunk; ++e) rounded[e] = Element(sum[e]);
    uint4 words[kWords];
    memcpy(words, rounded, sizeof(words));
    const int row = i / chunks, col = i % chunks * kChunk;
    Element* const to = col < shape.head_dim ? dk + row * shape.head_dim + col
                                             : dv + row * shape.value_dim + col - shape.head_dim;
#pragma unroll
    for (int w = 0; w < kWords; ++w) reinterpret_cast<uint4*>(to)[w] = words[w];
  }
}

}  // namespace jax_flash2
