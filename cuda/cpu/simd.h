// Vectors of the instruction set that this translation unit is compiled for, as GCC and Clang
// vector extensions: portable source, several widths. Everything here is local to its translation
// unit (see kernels.h), so that code for a newer CPU is never linked into code for an older one.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/problem.h"

namespace jax_flash2::cpu {
namespace {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

#define JF2_INLINE inline __attribute__((always_inline))

template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vec = typename VectorOf<T, kVectorBytes>::type;
// As many 16-bit elements as a vector has 32-bit ones.
using HalfVec = VectorOf<uint16_t, kVectorBytes / 2>::type;

// The integer of a lane's width: what a comparison of vectors yields.
template <class T>
using LaneInt = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class V, class T>
JF2_INLINE V load_as(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class T>
JF2_INLINE Vec<T> load(const T* p) {
  return load_as<Vec<T>>(p);
}
template <class V, class T>
JF2_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
template <class To, class From>
JF2_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
template <class T>
JF2_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}
template <class T>
JF2_INLINE Vec<T> iota() {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = static_cast<T>(i);
  return v;
}
template <class V>
JF2_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class T>
JF2_INLINE bool any_nan(Vec<T> v) {
  bool found = false;
  for (int i = 0; i < kLanes<T>; ++i) found |= v[i] != v[i];
  return found;
}

// 2^min(x, 0), within 2 ulp, and exactly 1 at 0; below the smallest normal number, 0. NaN stays
// NaN. x = n + f with n an integer, |f| <= 1/2; 2^f by a polynomial, n added to its exponent. What
// the softmax asks for is at most 0, but for the rounding of x, which can be large where the scores
// are.
JF2_INLINE Vec<float> exp2(Vec<float> x) {
  x = x > 0.0f ? Vec<float>{} : x;
  constexpr float kRounder = 0x1.8p23f;  // adding it leaves n in the low bits of the mantissa
  const Vec<float> shifted = x + kRounder;
  const Vec<float> f = x - (shifted - kRounder);
  Vec<float> p = 1.534581243e-04f * f + 1.339993090e-03f;  // minimax, relative error 2e-9
  p = p * f + 9.618489072e-03f;
  p = p * f + 5.550328642e-02f;
  p = p * f + 2.402264625e-01f;
  p = p * f + 6.931471825e-01f;
  p = p * f + 1.0f;
  const Vec<int32_t> bits = bit_cast<Vec<int32_t>>(p) + (bit_cast<Vec<int32_t>>(shifted) << 23);
  return x < -126.0f ? Vec<float>{} : bit_cast<Vec<float>>(bits);
}
JF2_INLINE Vec<double> exp2(Vec<double> x) {
  constexpr double kRounder = 0x1.8p52;
  // ln(2)^k / k!, k = 13 ... 1: the Taylor series, truncated below 1e-17.
  constexpr double kTerms[] = {
      1.3691488853904129e-12, 2.5678435993488206e-11, 4.4455382718708116e-10,
      7.0549116208011234e-09, 1.0178086009239699e-07, 1.3215486790144309e-06,
      1.5252733804059841e-05, 1.5403530393381608e-04, 1.3333558146428443e-03,
      9.6181291076284772e-03, 5.5504108664821580e-02, 2.4022650695910072e-01,
      6.9314718055994531e-01};
  x = x > 0.0 ? Vec<double>{} : x;
  const Vec<double> shifted = x + kRounder;
  const Vec<double> f = x - (shifted - kRounder);
  Vec<double> p = {};
#pragma GCC unroll 13
  for (const double term : kTerms) p = p * f + term;
  p = p * f + 1.0;
  const Vec<int64_t> bits = bit_cast<Vec<int64_t>>(p) + (bit_cast<Vec<int64_t>>(shifted) << 52);
  return x < -1022.0 ? Vec<double>{} : bit_cast<Vec<double>>(bits);
}

// 16-bit floats to float32 and back (to nearest even), by integer arithmetic: no instruction set
// extension is needed, and a flush-to-zero mode of the calling thread changes nothing.
JF2_INLINE Vec<uint32_t> widen(HalfVec h) { return __builtin_convertvector(h, Vec<uint32_t>); }

JF2_INLINE Vec<float> from_bfloat16(HalfVec h) { return bit_cast<Vec<float>>(widen(h) << 16); }

JF2_INLINE Vec<float> from_float16(HalfVec h) {
  const Vec<uint32_t> u = widen(h), magnitude = u & 0x7fffu;
  const Vec<uint32_t> normal = (magnitude << 13) + (112u << 23);
  const Vec<float> subnormal =
      bit_cast<Vec<float>>((magnitude << 13) + (113u << 23)) - bit_cast<float>(113u << 23);
  Vec<uint32_t> r = magnitude < 0x0400u ? bit_cast<Vec<uint32_t>>(subnormal) : normal;
  r = magnitude >= 0x7c00u ? normal + (112u << 23) : r;
  return bit_cast<Vec<float>>(r | ((u & 0x8000u) << 16));
}

// The result stands in the low half of each lane.
JF2_INLINE Vec<uint32_t> to_bfloat16(Vec<float> x) {
  const Vec<uint32_t> u = bit_cast<Vec<uint32_t>>(x);
  const Vec<uint32_t> rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return x == x ? rounded : (u >> 16) | 0x40u;
}

JF2_INLINE Vec<uint32_t> to_float16(Vec<float> x) {
  const Vec<uint32_t> u = bit_cast<Vec<uint32_t>>(x), magnitude = u & 0x7fffffffu;
  const Vec<uint32_t> normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Vec<uint32_t> subnormal =
      bit_cast<Vec<uint32_t>>(bit_cast<Vec<float>>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  Vec<uint32_t> r = magnitude < (113u << 23) ? subnormal : normal;
  r = magnitude >= (143u << 23) ? splat(0x7c00u) : r;
  r = x == x ? r : splat(0x7e00u);
  return r | ((u >> 16) & 0x8000u);
}

// Transposes a kLanes x kLanes matrix of 32- or 64-bit elements in registers: each round shuffles
// rows i and i + n / 2 like a deck of cards, which rotates the bits of (row, column) by one.
template <class V, int... I>
JF2_INLINE void shuffle_deck(V a, V b, V* out, std::integer_sequence<int, I...>) {
  constexpr int kN = sizeof...(I);
  out[0] = __builtin_shufflevector(a, b, (I / 2 + I % 2 * kN)...);
  out[1] = __builtin_shufflevector(a, b, (I / 2 + kN / 2 + I % 2 * kN)...);
}
template <class T>
JF2_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int kN = kLanes<T>;
#pragma GCC unroll 4
  for (int round = 1; round < kN; round *= 2) {
    Vec<T> shuffled[kN];
#pragma GCC unroll 16
    for (int i = 0; i < kN / 2; ++i) {
      shuffle_deck(rows[i], rows[i + kN / 2], shuffled + 2 * i,
                   std::make_integer_sequence<int, kN>());
    }
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) rows[i] = shuffled[i];
  }
}

}  // namespace
}  // namespace jax_flash2::cpu
