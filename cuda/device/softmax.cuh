// The online softmax of one warp's rows, in base 2 (FlashAttention-2, section 3.1).
#pragma once

#include "device/gemm.cuh"

namespace jax_flash2 {

JF2_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
JF2_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Natural log of a sum of exponentials that is 2^m l.
JF2_DEVICE float log_sum_exp(float m, float l) {
  constexpr float kLn2 = 0.693147180559945f;
  return (m + __log2f(l)) * kLn2;
}

// The maximum of row r, over the lanes that hold it.
template <int kM, int kN>
JF2_DEVICE float row_max(Accumulators<kM, kN>& s, int r) {
  float x = fmaxf(at(s, r, 0, 0), at(s, r, 0, 1));
#pragma unroll
  for (int j = 1; j < kN / 8; ++j) x = fmaxf(x, fmaxf(at(s, r, j, 0), at(s, r, j, 1)));
  return quad_max(x);
}

// The state of rows g, g + 8, g + 16, ... of a warp, as lane (g, t) of the accumulators holds them.
template <int kM>
class OnlineSoftmax {
 public:
  static constexpr int kRows = kM / 8;

  JF2_DEVICE OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      m_[r] = kLowest;
      l_[r] = 0.f;
    }
  }

  // S becomes P = 2^(scale_log2 * S - m), and O, which holds the sum of P V so far, is brought to
  // the new m. scale_log2 > 0. Hidden elements of S are -inf.
  //
  // kMaxLag < 0: m is the running maximum. Otherwise m may lag behind it by up to kMaxLag, and as
  // long as it does in every row of the warp, O stays as it is: P is then at most 2^kMaxLag, and
  // the result the same up to rounding.
  template <int kMaxLag, int kN, int kD>
  JF2_DEVICE void step(Accumulators<kM, kN>& s, Accumulators<kM, kD>& o, float scale_log2) {
    float m[kRows], alpha[kRows];
    bool keep = kMaxLag >= 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      m[r] = row_max(s, r) * scale_log2;
      keep = keep && m[r] <= m_[r] + float(kMaxLag);
    }
    if (kMaxLag >= 0) keep = __all_sync(0xffffffffu, keep);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      m[r] = keep ? m_[r] : fmaxf(m_[r], m[r]);
      alpha[r] = ptx::ex2(m_[r] - m[r]);
      m_[r] = m[r];
      l_[r] *= alpha[r];
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = at(s, r, j, e);
          x = ptx::ex2(fmaf(x, scale_log2, -m[r]));
          l_[r] += x;
        }
      }
    }
    if (!keep) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < kD / 8; ++j) {
          at(o, r, j, 0) *= alpha[r];
          at(o, r, j, 1) *= alpha[r];
        }
      }
    }
  }

  // Adds up the lanes of each quad; before it, every lane holds the sum of its own columns.
  JF2_DEVICE void finish() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) l_[r] = quad_sum(l_[r]);
  }
  JF2_DEVICE float sum(int r) const { return l_[r]; }
  // Natural log of the row's sum of exponentials.
  JF2_DEVICE float log_sum_exp(int r) const { return jax_flash2::log_sum_exp(m_[r], l_[r]); }

 private:
  // m of a row that has seen nothing. Finite, so that -inf - m is -inf and not NaN.
  static constexpr float kLowest = -3.402823466e38f;

  float m_[kRows];  // maximum of scale_log2 * S
  float l_[kRows];  // sum of P, of this lane's columns
};

}  // namespace jax_flash2
