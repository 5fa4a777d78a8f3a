// Division by a number that the host knows, as a multiplication. Floor 0: plain C++.
#pragma once

#include <cstdint>

#include "core/mask.h"

namespace jax_flash2 {

// x / d and x % d for 0 <= x < 2^31 and 1 <= d < 2^31. With 2^(l - 1) < d <= 2^l and
// m = ceil(2^(31 + l) / d), x m / 2^(31 + l) exceeds x / d by less than x / 2^31 / d < 1 / d.
struct Divisor {
  uint32_t d;
  uint32_t multiplier;  // m, 0 where d is 1
  int shift;            // l - 1

  Divisor() = default;
  explicit Divisor(uint32_t d) : d(d), multiplier(0), shift(0) {
    if (d == 1) return;
    while ((uint64_t{2} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (32 + shift)) + d - 1) / d);
  }
  JF2_HOST_DEVICE uint32_t quotient(uint32_t x) const {
    return multiplier == 0 ? x : uint32_t(uint64_t{x} * multiplier >> 32) >> shift;
  }
  JF2_HOST_DEVICE uint32_t remainder(uint32_t x) const { return x - quotient(x) * d; }
};

}  // namespace jax_flash2
