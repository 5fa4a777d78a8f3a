// In place of cuda/device/ptx_wgmma.cuh: products of a warp's 16 rows. Operands in shared memory are
// read, and results written, at some time between the instruction and the wait for it.
#pragma once

#include "device/ptx_sm80.cuh"

namespace jax_flash2::ptx {

// The 128-byte swizzle, which goes by the bits of the address.
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

template <int kN, typename Element>
struct Wgmma {
  template <bool kOuterMajorA, bool kOuterMajorB>
  static void ss(float (&d)[kN / 2], uint32_t a, uint32_t b, int accumulate) {
    issue(
        d, {}, b, accumulate,
        [a, warp = int(threadIdx.x) / 32 % 4](const Fragments&, Rows& rows) {
          for (int i = 0; i < 16; ++i)
            for (int k = 0; k < 16; ++k) rows[i][k] = element<kOuterMajorA>(a, warp * 16 + i, k);
        },
        element<kOuterMajorB>);
  }
  template <bool kOuterMajorB>
  static void rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint32_t b, int accumulate) {
    issue(
        d, {a[0], a[1], a[2], a[3]}, b, accumulate,
        [](const Fragments& fragments, Rows& rows) {
          for (int i = 0; i < 16; ++i)
            for (int k = 0; k < 16; ++k) {
              const uint32_t pair = fragments[i % 8 * 4 + k % 8 / 2][k / 8 * 2 + i / 8];
              Element x;
              x.bits = uint16_t(k % 2 == 0 ? pair : pair >> 16);
              rows[i][k] = x;
            }
        },
        element<kOuterMajorB>);
  }

 private:
  using Fragment = std::array<uint32_t, 4>;  // of A, in a lane's registers
  using Fragments = std::array<Fragment, 32>;
  using Rows = float[16][16];  // of A, a row an m
  using ReadB = float (*)(uint32_t, int, int);

  // Element (outer, k) of the operand with this descriptor.
  template <bool kOuterMajor>
  static inline float element(uint32_t descriptor, int outer, int k) {
    const uint32_t base = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    const uint32_t place =
        kOuterMajor ? outer / 64 * leading + k * 128 + outer % 64 * 2 : outer * 128 + k * 2;
    return load<Element>(swizzled(base + place));
  }

  template <typename ReadA>
  static void issue(float (&d)[kN / 2], const Fragment& a, uint32_t b, int accumulate,
                    const ReadA& read_a, ReadB read_b) {
    struct Lane {
      float* d;
      Fragment a;
      uint32_t b;
      int accumulate;
    } mine = {d, a, b, accumulate};
    emulated::together("wgmma", mine, [&](Lane** lanes) {
      Fragments fragments;
      std::array<float*, 32> results;
      for (int i = 0; i < 32; ++i) {
        if (lanes[i]->b != b || lanes[i]->accumulate != accumulate)
          emulated::fail("lanes give wgmma different operands");
        fragments[i] = lanes[i]->a;
        results[i] = lanes[i]->d;
      }
      emulated::Warp& warp = emulated::machine.warp();
      warp.products.push_back({warp.product_group, [=] {
                                 Rows rows;
                                 read_a(fragments, rows);
                                 multiply(results, rows, b, accumulate, read_b);
                               }});
    });
  }

  static void multiply(const std::array<float*, 32>& results, const Rows& a, uint32_t b,
                       int accumulate, ReadB read_b) {
    float columns[16][kN];
    for (int n = 0; n < kN; ++n)
      for (int k = 0; k < 16; ++k) columns[k][n] = read_b(b, n, k);
    for (int row = 0; row < 16; ++row) {
      float sums[kN] = {};
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < kN; ++n) sums[n] += a[row][k] * columns[k][n];
      for (int n = 0; n < kN; ++n) {
        // The accumulator that holds (row, n): lane and register.
        float& d = results[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2];
        d = accumulate ? d + sums[n] : sums[n];
      }
    }
  }
};

}  // namespace jax_flash2::ptx
