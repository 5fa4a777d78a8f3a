// The arithmetic of the matrix products: storage type, fragments of mma.sync, and c += a b.
//
// A `Math` is a kernel's element type together with how its products are formed. Fragments cover 16
// values of k for every Math, so that the loops above need not know which one runs:
//   Float16, BFloat16  one m16n8k16
//   Tf32               two m16n8k8 on operands rounded to TF32: relative error about 2^-11 a
//   product Tf32x3             each operand as hi + lo, lo * lo dropped: about 2^-22 a product
//
// The float32 Maths number k their own way: within 8 values of k, lane t of a quad holds k = 2t in
// the instruction's column t and k = 2t + 1 in its column t + 4. Any numbering is right as long as
// A and B share it, and this one makes an accumulator, whose lane t holds columns 2t and 2t + 1, an
// A operand as it stands.
#pragma once

#include "device/ptx_sm80.cuh"

namespace jax_flash2 {

// Two floats as one packed register of 16-bit elements, `x` in the low half.
template <typename Element>
JF2_DEVICE uint32_t pack2(float x, float y);
template <>
JF2_DEVICE uint32_t pack2<__half>(float x, float y) {
  const __half2 h = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&h);
}
template <>
JF2_DEVICE uint32_t pack2<__nv_bfloat16>(float x, float y) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&h);
}

// The two floats that pack2 rounded, the low half first.
template <typename Element>
JF2_DEVICE float2 unpack2(uint32_t packed);
template <>
JF2_DEVICE float2 unpack2<__half>(uint32_t packed) {
  return __half22float2(*reinterpret_cast<const __half2*>(&packed));
}
template <>
JF2_DEVICE float2 unpack2<__nv_bfloat16>(uint32_t packed) {
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}

// The largest finite number of an element type, about.
template <typename Element>
inline constexpr float kLargest = 3e38f;
template <>
inline constexpr float kLargest<__half> = 65504.f;

template <typename Element_>
struct Math16 {
  using Element = Element_;
  struct FragmentA {
    uint32_t x[4];
  };  // 16 m x 16 k
  struct FragmentB {
    uint32_t x[2][2];
  };  // two pieces of 8 n x 16 k

  static JF2_DEVICE void mma(float (&c)[4], const FragmentA& a, const FragmentB& b, int piece) {
    ptx::mma_m16n8k16<Element>(c, a.x, b.x[piece][0], b.x[piece][1]);
  }
  // Accumulators of 16 rows x 16 columns as an A operand whose k runs over the columns.
  static JF2_DEVICE FragmentA from_accumulators(const float (&left)[4], const float (&right)[4]) {
    return {{pack2<Element>(left[0], left[1]), pack2<Element>(left[2], left[3]),
             pack2<Element>(right[0], right[1]), pack2<Element>(right[2], right[3])}};
  }
};
using Float16 = Math16<__half>;
using BFloat16 = Math16<__nv_bfloat16>;

// One TF32 number, or a float32 as the sum of two.
template <bool kSplit>
struct Tf32Value {
  uint32_t hi;
  JF2_DEVICE void set(float x) { hi = ptx::cvt_rna_tf32(x); }
};
template <>
struct Tf32Value<true> {
  uint32_t hi, lo;
  JF2_DEVICE void set(float x) {
    hi = ptx::cvt_rna_tf32(x);
    // An infinite x would make inf - inf: its low part is 0.
    const float rest = x - __uint_as_float(hi);
    lo = ptx::cvt_rna_tf32(fabsf(x) <= 3.4e38f ? rest : 0.f);
  }
};

template <bool kSplit>
struct MathTf32 {
  using Element = float;
  using Value = Tf32Value<kSplit>;
  struct FragmentA {
    Value x[2][4];
  };  // [8 values of k][row g or g + 8, column t or t + 4]
  struct FragmentB {
    Value x[2][2][2];
  };  // [piece of 8 n][8 values of k][column t or t + 4]

  static JF2_DEVICE void mma(float (&c)[4], const FragmentA& a, const FragmentB& b, int piece) {
    if constexpr (kSplit) {
      // The tensor core truncates its sums, and over a long sum that bias outgrows float32's own
      // error. Short sums here, small products first, and float32's rounding between them.
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int k8 = 0; k8 < 2; ++k8) {
        const Value(&x)[4] = a.x[k8];
        const Value(&y)[2] = b.x[piece][k8];
        ptx::mma_m16n8k8_tf32(sum, {x[0].lo, x[1].lo, x[2].lo, x[3].lo}, y[0].hi, y[1].hi);
        ptx::mma_m16n8k8_tf32(sum, {x[0].hi, x[1].hi, x[2].hi, x[3].hi}, y[0].lo, y[1].lo);
      }
#pragma unroll
      for (int k8 = 0; k8 < 2; ++k8) mma_hi(sum, a.x[k8], b.x[piece][k8]);
#pragma unroll
      for (int e = 0; e < 4; ++e) c[e] += sum[e];
    } else {
#pragma unroll
      for (int k8 = 0; k8 < 2; ++k8) mma_hi(c, a.x[k8], b.x[piece][k8]);
    }
  }
  static JF2_DEVICE FragmentA from_accumulators(const float (&left)[4], const float (&right)[4]) {
    FragmentA a;
#pragma unroll
    for (int k8 = 0; k8 < 2; ++k8) {
      const float (&c)[4] = k8 == 0 ? left : right;
      a.x[k8][0].set(c[0]);  // row g, column 2t
      a.x[k8][1].set(c[2]);  // row g + 8, column 2t
      a.x[k8][2].set(c[1]);  // row g, column 2t + 1
      a.x[k8][3].set(c[3]);  // row g + 8, column 2t + 1
    }
    return a;
  }

 private:
  static JF2_DEVICE void mma_hi(float (&c)[4], const Value (&x)[4], const Value (&y)[2]) {
    ptx::mma_m16n8k8_tf32(c, {x[0].hi, x[1].hi, x[2].hi, x[3].hi}, y[0].hi, y[1].hi);
  }
};
using Tf32 = MathTf32<false>;
using Tf32x3 = MathTf32<true>;

}  // namespace jax_flash2
