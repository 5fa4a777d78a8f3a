// In which order the sm_90a kernels that take query tiles from a queue take them.
#pragma once

#include <algorithm>

#include "core/problem.h"
#include "kernels/sm90/tile_order.cuh"

namespace jax_flash2::gpu {

// Full attention: head by head. A band makes tiles unequal: longest first within sections of heads,
// of four tiles a thread block. Short rows pass over their keys and values often, and find them
// in L2 if it is two; as long ones do where four would take too much of it, more than `section_mb`.
inline sm90::TileOrder tile_order(const Shape& s, const BandSpec& band, int query_tiles, int blocks,
                                  int section_mb) {
  constexpr int kLongRow = 4096;
  const int heads = static_cast<int>(s.batch * s.query_heads);
  if (band.upper >= kUnbounded && band.lower <= -kUnbounded) return {query_tiles, heads, 0};
  const int64_t kv_bytes = int64_t{2} * s.kv_len * (s.head_dim + s.value_dim);
  const auto section = [&](int tiles) {
    return round_up(std::max(1, tiles * blocks / query_tiles), s.group());
  };
  const bool four = s.kv_len >= kLongRow && section(4) / s.group() * kv_bytes <= int64_t{section_mb}
                                                                                     << 20;
  return {query_tiles, heads, static_cast<int>(std::min<int64_t>(heads, section(four ? 4 : 2)))};
}

}  // namespace jax_flash2::gpu
