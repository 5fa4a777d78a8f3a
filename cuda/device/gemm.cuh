// One warp's matrix products out of shared memory: operands, fragments, accumulators.
//
// An operand is a SmemTile seen by one warp as the A (m x k) or B (n x k) side of a product.
// "Outer" is m or n. kKMajor: the tile's rows are outer and its columns k (Q and K in Q K^T).
// kOuterMajor: the rows are k and the columns outer (V in P V; dS read as dS^T). Offsets into an
// operand are compile-time constants after unrolling, so that an address costs at most one
// exclusive-or.
#pragma once

#include "device/math.cuh"
#include "device/smem_tile.cuh"

namespace jax_flash2 {

enum class Side { kA, kB };
enum class Major { kKMajor, kOuterMajor };

template <typename Math, typename Tile, Side kSide, Major kMajor>
class Operand;

// 16-bit: one ldmatrix.x4 for 16 outer x 16 k.
template <typename Element, typename Tile, Side kSide, Major kMajor>
class Operand<Math16<Element>, Tile, kSide, kMajor> {
 public:
  using Math = Math16<Element>;

  // The operand begins at row `row`, column `col` of the tile, both multiples of 16.
  JF2_DEVICE Operand(Tile tile, int row, int col, int lane) {
    // Lane l addresses row l % 8 of 8x8 matrix l / 8. The matrices are, in register order, A:
    // (outer 0, k 0), (outer 8, k 0), (outer 0, k 8), (outer 8, k 8); B: k before outer.
    const int low = (lane >> 3) & 1, high = lane >> 4;
    const int outer8 = kSide == Side::kA ? low : high, k8 = kSide == Side::kA ? high : low;
    const int row8 = kMajor == Major::kKMajor ? outer8 : k8;
    const int col8 = kMajor == Major::kKMajor ? k8 : outer8;
    address_ = tile.address(row + row8 * 8 + (lane & 7), col + col8 * 8);
  }
  // The 16 x 16 fragment at (outer, k), both multiples of 16.
  template <typename Fragment>
  JF2_DEVICE void load(Fragment& f, int outer, int k) const {
    const uint32_t a =
        kMajor == Major::kKMajor ? Tile::step(address_, outer, k) : Tile::step(address_, k, outer);
    uint32_t (&r)[4] = reinterpret_cast<uint32_t (&)[4]>(f.x);
    if constexpr (kMajor == Major::kKMajor) {
      ptx::ldmatrix_x4(r, a);
    } else {
      ptx::ldmatrix_x4_trans(r, a);
    }
  }

 private:
  uint32_t address_;
};

// float32: 8-byte loads where k is contiguous, 4-byte ones where it is not; k numbered as math.cuh
// says.
template <bool kSplit, typename Tile, Side kSide, Major kMajor>
class Operand<MathTf32<kSplit>, Tile, kSide, kMajor> {
 public:
  using Math = MathTf32<kSplit>;

  JF2_DEVICE Operand(Tile tile, int row, int col, int lane) {
    const int g = lane >> 2, t = lane & 3;
    if constexpr (kMajor == Major::kKMajor) {
      even_ = tile.address(row + g, col + 2 * t);
      odd_ = 0;  // k = 2t + 1 is the second word of the same access
    } else {
      even_ = tile.address(row + 2 * t, col + g);
      odd_ = tile.address(row + 2 * t + 1, col + g);
    }
  }
  template <typename Fragment>
  JF2_DEVICE void load(Fragment& f, int outer, int k) const {
#pragma unroll
    for (int outer8 = 0; outer8 < 2; ++outer8) {
#pragma unroll
      for (int k8 = 0; k8 < 2; ++k8) {
        float2 x;  // k = 2t, 2t + 1
        if constexpr (kMajor == Major::kKMajor) {
          x = ptx::lds_f32x2(Tile::step(even_, outer + outer8 * 8, k + k8 * 8));
        } else {
          x.x = ptx::lds_f32(Tile::step(even_, k + k8 * 8, outer + outer8 * 8));
          x.y = ptx::lds_f32(Tile::step(odd_, k + k8 * 8, outer + outer8 * 8));
        }
        if constexpr (kSide == Side::kA) {
          f.x[k8][outer8].set(x.x);
          f.x[k8][2 + outer8].set(x.y);
        } else {
          f.x[outer8][k8][0].set(x.x);
          f.x[outer8][k8][1].set(x.y);
        }
      }
    }
  }

 private:
  uint32_t even_, odd_;
};

template <typename Math, typename Tile, Major kMajor>
using OperandA = Operand<Math, Tile, Side::kA, kMajor>;
template <typename Math, typename Tile, Major kMajor>
using OperandB = Operand<Math, Tile, Side::kB, kMajor>;

// A warp's accumulators: kM x kN floats. x[i][j] is the 16 x 8 piece at row 16 i, column 8 j;
// within it lane (g, t) holds columns 2t, 2t + 1 of row g in [0], [1] and of row g + 8 in [2], [3].
template <int kM_, int kN_>
struct Accumulators {
  static constexpr int kM = kM_, kN = kN_;
  static_assert(kM % 16 == 0 && kN % 16 == 0, "accumulators are whole 16 x 16 pieces");
  float x[kM / 16][kN / 8][4];

  JF2_DEVICE void zero() {
#pragma unroll
    for (int i = 0; i < kM / 16; ++i)
#pragma unroll
      for (int j = 0; j < kN / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[i][j][e] = 0.f;
  }
};

// Element e of column pair j in row r of a lane's accumulators; its rows are 8 apart.
template <int kM, int kN>
JF2_DEVICE float& at(Accumulators<kM, kN>& c, int r, int j, int e) {
  return c.x[r / 2][j][r % 2 * 2 + e];
}

// An A operand held in registers, for one that several products share.
template <typename Math_, int kM, int kK>
class RegisterOperandA {
 public:
  using Math = Math_;

  template <typename A>
  JF2_DEVICE void fill(const A& a) {
#pragma unroll
    for (int i = 0; i < kM / 16; ++i)
#pragma unroll
      for (int k = 0; k < kK / 16; ++k) a.load(f_[i][k], i * 16, k * 16);
  }
  JF2_DEVICE void load(typename Math::FragmentA& f, int outer, int k) const {
    f = f_[outer / 16][k / 16];
  }

 private:
  typename Math::FragmentA f_[kM / 16][kK / 16];
};

// An A operand made of another product's accumulators, rounded to the Math's element.
template <typename Math_, int kM, int kK>
class AccumulatorOperandA {
 public:
  using Math = Math_;

  JF2_DEVICE explicit AccumulatorOperandA(const Accumulators<kM, kK>& p) : p_(p) {}
  JF2_DEVICE void load(typename Math::FragmentA& f, int outer, int k) const {
    f = Math::from_accumulators(p_.x[outer / 16][k / 8], p_.x[outer / 16][k / 8 + 1]);
  }

 private:
  const Accumulators<kM, kK>& p_;
};

// c += A B^T over kK values of k. Fragments are loaded one step ahead of the products that read
// them.
template <int kK, typename A, typename B, int kM, int kN>
JF2_DEVICE void gemm(Accumulators<kM, kN>& c, const A& a, const B& b) {
  using Math = typename A::Math;
  typename Math::FragmentA fa[2][kM / 16];
  typename Math::FragmentB fb[2];
  b.load(fb[0], 0, 0);
#pragma unroll
  for (int i = 0; i < kM / 16; ++i) a.load(fa[0][i], i * 16, 0);
#pragma unroll
  for (int k = 0; k < kK / 16; ++k) {
#pragma unroll
    for (int n = 0; n < kN / 16; ++n) {
      const int step = k * (kN / 16) + n;
      if (n + 1 < kN / 16) {
        b.load(fb[(step + 1) % 2], (n + 1) * 16, k * 16);
      } else if (k + 1 < kK / 16) {
        b.load(fb[(step + 1) % 2], 0, (k + 1) * 16);
#pragma unroll
        for (int i = 0; i < kM / 16; ++i) a.load(fa[(k + 1) % 2][i], i * 16, (k + 1) * 16);
      }
#pragma unroll
      for (int i = 0; i < kM / 16; ++i) {
        Math::mma(c.x[i][n * 2], fa[k % 2][i], fb[step % 2], 0);
        Math::mma(c.x[i][n * 2 + 1], fa[k % 2][i], fb[step % 2], 1);
      }
    }
  }
}

// c += P B^T where P, kM x kK, is another product's accumulators, rounded to the Math's element.
template <typename Math, typename B, int kM, int kK, int kN>
JF2_DEVICE void gemm_from_accumulators(Accumulators<kM, kN>& c, const Accumulators<kM, kK>& p,
                                       const B& b) {
  gemm<kK>(c, AccumulatorOperandA<Math, kM, kK>(p), b);
}

}  // namespace jax_flash2
