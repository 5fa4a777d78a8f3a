// Between the arrays of a problem, in their dtype, and the packed operands of gemm.h. Packing is
// where padding and hidden keys become zeros, so that their values never meet a product.
#pragma once

#include "cpu/gemm.h"

namespace jax_flash2::cpu {
namespace {

// Reads kLanes<R> elements at `p`, as R.
template <class R, DType kType>
JF2_INLINE Vec<R> read_vector(const void* p) {
  if constexpr (kType == DType::kFloat16) {
    return from_float16(load_as<HalfVec>(p));
  } else if constexpr (kType == DType::kBFloat16) {
    return from_bfloat16(load_as<HalfVec>(p));
  } else {
    return load_as<Vec<R>>(p);
  }
}
template <class R, DType kType>
JF2_INLINE void write_vector(void* p, Vec<R> x) {
  if constexpr (kType == DType::kFloat16) {
    store(p, __builtin_convertvector(to_float16(x), HalfVec));
  } else if constexpr (kType == DType::kBFloat16) {
    store(p, __builtin_convertvector(to_bfloat16(x), HalfVec));
  } else {
    store(p, x);
  }
}

inline int size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}
inline const char* element(const void* base, DType type, int64_t index) {
  return static_cast<const char*>(base) + index * size_of(type);
}
inline char* element(void* base, DType type, int64_t index) {
  return static_cast<char*>(base) + index * size_of(type);
}

// Calls f.template operator()<kType>() for a dtype whose arithmetic is done in R.
template <class R, class F>
JF2_INLINE void for_dtype(DType type, F f) {
  if constexpr (std::is_same_v<R, double>) {
    f.template operator()<DType::kFloat64>();
  } else if (type == DType::kFloat32) {
    f.template operator()<DType::kFloat32>();
  } else if (type == DType::kBFloat16) {
    f.template operator()<DType::kBFloat16>();
  } else {
    f.template operator()<DType::kFloat16>();
  }
}

// The n elements at `src` as R, then zeros up to a whole vector.
template <class R>
void read_row(DType type, const char* src, int n, R* dst) {
  for_dtype<R>(type, [&]<DType kType>() {
    const int size = size_of(kType);
    int i = 0;
    for (; i + kLanes<R> <= n; i += kLanes<R>) {
      store(dst + i, read_vector<R, kType>(src + i * size));
    }
    if (i < n) {
      char tail[kVectorBytes] = {};
      __builtin_memcpy(tail, src + i * size, (n - i) * size);
      store(dst + i, read_vector<R, kType>(tail));
    }
  });
}

// dst = factor * src, rounded to the dtype.
template <class R>
void write_row(DType type, const R* src, R factor, int n, char* dst) {
  for_dtype<R>(type, [&]<DType kType>() {
    const int size = size_of(kType);
    int i = 0;
    for (; i + kLanes<R> <= n; i += kLanes<R>) {
      write_vector<R, kType>(dst + i * size, load(src + i) * factor);
    }
    if (i < n) {
      char tail[kVectorBytes];
      write_vector<R, kType>(tail, load(src + i) * factor);
      __builtin_memcpy(dst + i * size, tail, (n - i) * size);
    }
  });
}

template <class T>
void fill(T* dst, int n, T value) {
  for (int i = 0; i < n; ++i) dst[i] = value;
}

// The n elements at `src` as units along the row, then zeros up to a whole vector of units. Pairs
// are the bfloat16 elements as they are.
template <class Unit>
void read_units(DType type, const char* src, int n, Unit* dst) {
  if constexpr (kIsPair<Unit>) {
    __builtin_memcpy(dst, src, n * 2);
    const int units = n / kDepth<Unit>;
    fill(dst + units, static_cast<int>(round_up(units, kLanes<Unit>)) - units, Unit(0));
  } else {
    read_row(type, src, n, dst);
  }
}

// Pairs along the rows become pairs of neighbouring rows: [rows][width / 2] to [rows / 2][width].
inline void pair_rows(const Pair* tile, int rows, int width, Pair* paired) {
  constexpr int kN = kLanes<Pair>;
  for (int r = 0; r < rows; r += 2) {
    const Pair* even = tile + r * kHeadPitch<Pair>;
    const Pair* odd = even + kHeadPitch<Pair>;
    for (int i = 0; i < width; i += kN) {
      store(paired + r / 2 * kHeadPitch<float> + i,
            widen(load_as<HalfVec>(even + i / 2)) | widen(load_as<HalfVec>(odd + i / 2)) << 16);
    }
  }
}

// Starts to fetch a row that will be read soon: rows of one head lie far apart, and the hardware
// does not see them coming.
inline void prefetch(const char* row, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
}

// The operand of a product along rows or keys of a tile: pairs have their own copy of it.
template <class Unit, class T>
JF2_INLINE const Unit* operand(const T* plain, const Unit* paired) {
  if constexpr (kIsPair<Unit>) {
    return paired;
  } else {
    return plain;
  }
}

#if defined(__AVX512BF16__)
// Two vectors, rounded to bfloat16 and paired lane by lane.
JF2_INLINE Vec<Pair> pair_lanes(Vec<float> even, Vec<float> odd) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const auto halves =
      bit_cast<Halves>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(odd), bit_cast<__m512>(even)));
  return bit_cast<Vec<Pair>>(__builtin_shufflevector(halves, halves, 0, 16, 1, 17, 2, 18, 3, 19, 4,
                                                     20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}
// One vector, rounded to bfloat16 and stored in order.
JF2_INLINE void store_as_pairs(Pair* to, Vec<float> x) {
  store(to, _mm512_cvtneps_pbh(bit_cast<__m512>(x)));
}
#endif

// True if any of rows x width units holds NaN or Inf.
template <class Unit>
bool holds_non_finite(const Unit* tile, int pitch, int rows, int width) {
  using R = Real<Unit>;
  Vec<R> taint = {};
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < width; i += kLanes<Unit>) {
      const Vec<Unit> x = load(tile + r * pitch + i);
      if constexpr (kIsPair<Unit>) {
        taint += bit_cast<Vec<R>>(x & 0xffff0000u) * 0.0f + bit_cast<Vec<R>>(x << 16) * 0.0f;
      } else {
        taint += x * R(0);
      }
    }
  }
  return any_nan<R>(taint);
}

// The transpose of a tile of rows: [width][rows] units, in panels of kPanel rows; rows and width up
// to whole vectors.
template <class Unit>
void transpose_to_panels(const Unit* tile, int rows, int width, Unit* panels) {
  constexpr int kN = kLanes<Unit>;
  for (int r = 0; r < rows; r += kN) {
    Unit* panel = panels + r / kPanel<Unit> * kPanel<Unit> * width + r % kPanel<Unit>;
    for (int i = 0; i < width; i += kN) {
      Vec<Unit> block[kN];
#pragma GCC unroll 16
      for (int j = 0; j < kN; ++j) block[j] = load(tile + (r + j) * kHeadPitch<Unit> + i);
      transpose<Unit>(block);
      for (int j = 0; j < kN && i + j < width; ++j) store(panel + (i + j) * kPanel<Unit>, block[j]);
    }
  }
}

}  // namespace
}  // namespace jax_flash2::cpu
