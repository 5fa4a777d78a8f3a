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

// True if any of the rows x width elements is NaN or Inf.
template <class R>
bool holds_non_finite(const R* tile, int pitch, int rows, int width) {
  Vec<R> taint = {};
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < width; i += kLanes<R>) taint += load(tile + r * pitch + i) * R(0);
  }
  return any_nan<R>(taint);
}

// The transpose of a tile of rows: [width][rows], in panels of kPanel rows; rows and width up to
// whole vectors. `sign` multiplies.
template <class R>
void transpose_to_panels(const R* tile, int rows, int width, R* panels) {
  constexpr int kN = kLanes<R>;
  for (int r = 0; r < rows; r += kN) {
    R* panel = panels + r / kPanel<R> * kPanel<R> * width + r % kPanel<R>;
    for (int i = 0; i < width; i += kN) {
      Vec<R> block[kN];
#pragma GCC unroll 16
      for (int j = 0; j < kN; ++j) block[j] = load(tile + (r + j) * kHeadPitch<R> + i);
      transpose<R>(block);
      for (int j = 0; j < kN && i + j < width; ++j) store(panel + (i + j) * kPanel<R>, block[j]);
    }
  }
}

}  // namespace
}  // namespace jax_flash2::cpu
