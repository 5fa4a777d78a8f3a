// The matrix products: C (m x n) from A (m x k) and B (k x n), all packed in scratch memory. A tile
// of C stays in registers, n runs along the vectors, and each element of A is broadcast.
//
// An operand is made of units: one float, one double, or a pair of bfloat16 that are neighbours in
// k (one instruction then does two steps of k). The three forms differ in how A lies in memory:
//   kScores: A by rows, B in panels of kPanel columns: S = Q K^T and dP = dO V^T
//   kOuter:  A by columns: O += P V, dV += P^T dO, dK += dS^T Q
//   kInner:  A by rows: dQ = dS K
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "cpu/simd.h"

namespace jax_flash2::cpu {
namespace {

using Pair = uint32_t;  // two bfloat16; the lower half is the even k

template <class Unit>
inline constexpr bool kIsPair = std::is_same_v<Unit, Pair>;
// What bfloat16 arrays are computed in.
#if defined(__AVX512BF16__)
using BFloat16Unit = Pair;
#else
using BFloat16Unit = float;
#endif
// Elements of k in a unit.
template <class Unit>
inline constexpr int kDepth = kIsPair<Unit> ? 2 : 1;
// What products are accumulated in, and scores are kept in.
template <class Unit>
using Real = std::conditional_t<kIsPair<Unit>, float, Unit>;

// Register tile: kMr x kNr vectors, sized to the registers of the machine.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kMr = 8;
#else
inline constexpr int kMr = 4;
#endif
inline constexpr int kNr = 2;
template <class T>
inline constexpr int kPanel = kNr * kLanes<T>;

// Rows of a tile of head-dim vectors lie this far apart: an odd number of cache lines, so that
// equal columns of many rows do not fall into one set of the cache.
template <class Unit>
inline constexpr int kHeadPitch = kMaxHeadDim / kDepth<Unit> + kLanes<Unit>;
// Scores of a tile: at most this many columns.
inline constexpr int kScorePitch = 128;

template <class R>
JF2_INLINE void multiply_add(Vec<R>& acc, R a, Vec<R> b) {
  acc += a * b;
}
#if defined(__AVX512BF16__)
JF2_INLINE void multiply_add(Vec<float>& acc, Pair a, Vec<Pair> b) {
  acc = bit_cast<Vec<float>>(
      _mm512_dpbf16_ps(bit_cast<__m512>(acc), bit_cast<__m512bh>(splat(a)), bit_cast<__m512bh>(b)));
}
#endif

enum class Form { kScores, kOuter, kInner };
enum class Update { kStore, kAdd, kScaleAdd };  // C = AB; C += AB; C = factor[m] * C + AB

template <Form kForm, class Unit>
struct Layout {
  static constexpr bool kByColumns = kForm == Form::kOuter;
  static constexpr int kAPitch = kForm == Form::kScores ? kHeadPitch<Unit>
                                 : kByColumns           ? kScorePitch
                                                        : kScorePitch / kDepth<Unit>;
  static constexpr int kBPitch = kForm == Form::kScores ? kPanel<Unit> : kHeadPitch<Real<Unit>>;
  static constexpr int kCPitch = kForm == Form::kScores ? kScorePitch : kHeadPitch<Real<Unit>>;
};

template <Form kForm, class Unit, int kVecs>
__attribute__((noinline)) void gemm_tile(int steps, const Unit* a, const Unit* b, Real<Unit>* c,
                                         Update update, const Real<Unit>* factor) {
  using L = Layout<kForm, Unit>;
  using R = Real<Unit>;
  constexpr int kN = kLanes<R>;
  Vec<R> acc[kMr][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kMr; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) acc[i][j] = Vec<R>{};
  }
  for (int k = 0; k < steps; ++k) {
    Vec<Unit> bk[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) bk[j] = load(b + k * L::kBPitch + j * kN);
#pragma GCC unroll 8
    for (int i = 0; i < kMr; ++i) {
      const Unit ai = L::kByColumns ? a[k * L::kAPitch + i] : a[i * L::kAPitch + k];
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) multiply_add(acc[i][j], ai, bk[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kMr; ++i) {
    R* row = c + i * L::kCPitch;
    if (update == Update::kStore) {
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) store(row + j * kN, acc[i][j]);
    } else {
      const R scale = update == Update::kScaleAdd ? factor[i] : R(1);
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) store(row + j * kN, load(row + j * kN) * scale + acc[i][j]);
    }
  }
}

// m is a multiple of 8, n of kLanes; `steps` counts units of k.
template <Form kForm, class Unit>
void gemm(int m, int n, int steps, const Unit* a, const Unit* b, Real<Unit>* c,
          Update update = Update::kStore, const Real<Unit>* factor = nullptr) {
  using L = Layout<kForm, Unit>;
  for (int j = 0; j < n; j += kPanel<Unit>) {
    const Unit* bj = kForm == Form::kScores ? b + j * steps : b + j;
    for (int i = 0; i < m; i += kMr) {
      const Unit* ai = a + i * (L::kByColumns ? 1 : L::kAPitch);
      const auto tile =
          n - j >= kPanel<Unit> ? gemm_tile<kForm, Unit, kNr> : gemm_tile<kForm, Unit, 1>;
      tile(steps, ai, bj, c + i * L::kCPitch + j, update, factor != nullptr ? factor + i : factor);
    }
  }
}

// The same for an operand that holds NaN or Inf where a mask makes the other operand 0: skips those
// products, since 0 * NaN is NaN. Slow, and rarely needed. Not for kScores, whose results are
// masked.
template <Form kForm, class Unit>
__attribute__((noinline)) void gemm_skipping_zeros(int m, int n, int steps, const Unit* a,
                                                   const Unit* b, Real<Unit>* c, Update update,
                                                   const Real<Unit>* factor = nullptr) {
  using L = Layout<kForm, Unit>;
  using R = Real<Unit>;
  for (int i = 0; i < m; ++i) {
    R* row = c + i * L::kCPitch;
    for (int j = 0; j < n; ++j) {
      if (update == Update::kStore) row[j] = 0;
      if (update == Update::kScaleAdd) row[j] *= factor[i];
    }
    for (int k = 0; k < steps; ++k) {
      const Unit x = L::kByColumns ? a[k * L::kAPitch + i] : a[i * L::kAPitch + k];
      for (int j = 0; j < n; ++j) {
        const Unit y = b[k * L::kBPitch + j];
        if constexpr (kIsPair<Unit>) {
          if (x << 17) row[j] += bit_cast<float>(x << 16) * bit_cast<float>(y << 16);
          if ((x >> 16) << 17)
            row[j] += bit_cast<float>(x & ~0xffffu) * bit_cast<float>(y & ~0xffffu);
        } else {
          if (x != 0) row[j] += x * y;
        }
      }
    }
  }
}

}  // namespace
}  // namespace jax_flash2::cpu
