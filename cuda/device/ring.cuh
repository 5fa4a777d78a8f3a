// Places in rings of mbarriers and of what they guard: a slot, and the parity of its current phase, which
// flips each time round.
#pragma once

#include "device/ptx_sm80.cuh"

namespace jax_flash2 {

// A place in a ring of any size.
template <int kSize>
struct RingPlace {
  int count = 0;  // modulo two rounds

  JF2_DEVICE int slot() const { return count < kSize ? count : count - kSize; }
  JF2_DEVICE uint32_t parity() const { return count < kSize ? 0 : 1; }
  JF2_DEVICE void advance() { count = count + 1 == 2 * kSize ? 0 : count + 1; }
};

// Where a running count stands in a ring.
template <int kSize>
struct Ring {
  static_assert((kSize & (kSize - 1)) == 0, "rings are powers of two");
  static JF2_DEVICE int slot(uint32_t count) { return count % kSize; }
  static JF2_DEVICE uint32_t parity(uint32_t count) { return count / kSize & 1; }
};

}  // namespace jax_flash2
