// The queue of query tiles of the persistent kernels that walk over keys.
#pragma once

#include "device/ptx_sm80.cuh"

namespace jax_flash2::sm90 {

// The order in which tiles are handed out.
struct TileOrder {
  int query_tiles;    // a head
  int heads;          // B * N
  int section_heads;  // heads taken together, longest tiles first; 0: head by head

  struct Tile {
    int head, query_tile;
  };
  JF2_DEVICE int tiles() const { return query_tiles * heads; }
  JF2_DEVICE Tile at(int i) const {
    if (section_heads == 0) return {i / query_tiles, i % query_tiles};
    const int first = i / (section_heads * query_tiles) * section_heads;
    const int here = min(section_heads, heads - first);
    const int rest = i - first * query_tiles;
    return {first + rest % here, query_tiles - 1 - rest / here};
  }
};

}  // namespace jax_flash2::sm90
