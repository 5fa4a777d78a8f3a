// In place of CUDA's header of this name: float16, rounded to nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;

  __half() = default;
  explicit __half(float x) {
    const float size = std::fabs(x);
    uint32_t u;
    if (x != x) {
      u = 0x7fff;
    } else if (size >= 65520.f) {
      u = 0x7c00;
    } else if (size < 0x1p-14f) {  // subnormal: a sum with 1/2 rounds where float16 does
      const float sum = size + 0.5f;
      std::memcpy(&u, &sum, 4);
      u -= 0x3f000000;
    } else {
      std::memcpy(&u, &size, 4);
      u = (u - (112 << 23) + 0xfff + (u >> 13 & 1)) >> 13;
    }
    bits = uint16_t(u | (std::signbit(x) ? 0x8000 : 0));
  }
  operator float() const {
    const uint32_t size = bits & 0x7fff;
    const float x = size < 0x7c00 ? __uint_as_float(size << 13) * 0x1p112f
                                  : __uint_as_float(size << 13 | 0x7f800000);
    return bits & 0x8000 ? -x : x;
  }
};
struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }
