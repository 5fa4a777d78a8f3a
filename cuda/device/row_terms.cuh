// LSE and D of a query as the sm_90a backward takes them: each a sum of three bfloat16 terms, in
// which a float32 loses nothing, negated and in the units of S and dP. Three rows of terms times
// ones, as one more product of the tensor cores, add them to the scores of all keys at once.
//
// In `row_stats` a tile of 64 queries of a head is 768 bytes: three rows of 64 terms of LSE, then of D,
// each row in the place that the 128-byte swizzle gives it, so that a plain copy brings them to shared
// memory as wgmma wants them.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "core/problem.h"

namespace jax_flash2 {

inline constexpr int kTermRows = 3, kTermTile = 64, kTermBytes = kTermRows * kTermTile * 2;
static_assert(2 * kTermBytes == kRowStats * kTermTile * int(sizeof(float)),
              "the terms fill the planes of row_stats");
// Takes a row's scores so far down that its P is 0, and stays finite in sums and products.
inline constexpr float kHiddenTerm = -8e37f;

// Writes the terms of -x for a query of a tile, to where the tile's terms of LSE or of D begin.
__device__ __forceinline__ void store_terms(char* tile, int query, float minus_x) {
#pragma unroll
  for (int i = 0; i < kTermRows; ++i) {
    const __nv_bfloat16 term = __float2bfloat16_rn(minus_x);
    minus_x -= __bfloat162float(term);
    *reinterpret_cast<__nv_bfloat16*>(tile + i * 128 + ((query * 2) ^ (i * 16))) = term;
  }
}

// The sum of the terms that store_terms wrote.
__device__ __forceinline__ float load_terms(const char* tile, int query) {
  float sum = 0.f;
#pragma unroll
  for (int i = kTermRows - 1; i >= 0; --i)
    sum += __bfloat162float(
        *reinterpret_cast<const __nv_bfloat16*>(tile + i * 128 + ((query * 2) ^ (i * 16))));
  return sum;
}

}  // namespace jax_flash2
