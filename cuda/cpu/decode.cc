// Decoding on the host: few rows, so that vectors run along the head dim.
//
//  1. The keys are visited in tiles; rows of K and V are widened to the type of the arithmetic once
//     for all rows of the group. Keys of missing pages are zeros, and hidden.
//  2. For each row, S = Q K^T a vector of keys at a time: as many running sums as a vector has
//     lanes, transposed and added up at the end.
//  3. The running maximum m, P = exp2(c (S - m)), c = scale * log2(e), the running sum l.
//  4. O = exp2(c (m' - m)) O + P V over the keys that the row sees, m' being the maximum before.
//  5. At the end O / l and LSE = scale m + log(l); or O, m and l for a merge, which brings them to
//     the largest m and adds.
#include "cpu/rows.h"

namespace jax_flash2::cpu {
namespace {

template <class R>
struct DecodeScratch {
  alignas(64) R q[kRowTile * kHeadPitch<R>];
  R k[kDecodeTile * kHeadPitch<R>], v[kDecodeTile * kHeadPitch<R>];
  R scores[kDecodeTile];
  R out[kRowTile * kHeadPitch<R>];  // O, not yet divided by l
  R max[kRowTile], sum[kRowTile];   // m and l
  LaneInt<R> hidden[kDecodeTile];   // not 0: the key has no page
};

template <class R>
class Decode {
  static constexpr int kN = kLanes<R>;
  using Index = LaneInt<R>;
  static constexpr R kInf = static_cast<R>(__builtin_inf());

 public:
  Decode(const DecodeProblem& problem, Head head, Rows rows, DecodeScratch<R>& scratch)
      : p_(problem),
        s_(scratch),
        view_(problem.shape, problem.dtype, problem.band(head.b), head),
        head_(head),
        rows_(rows),
        log2_scale_(static_cast<R>(problem.scale * kLog2E)) {}

  void part(Range keys, R* partial) {
    for (int i = 0; i < count(); ++i) start_row(i);
    for (int k = keys.begin; k < keys.end; k += kDecodeTile) {
      const Range tile = {k, min(k + kDecodeTile, keys.end)};
      load_keys(tile);
      for (int i = 0; i < count(); ++i) visit(tile, i);
    }
    for (int i = 0; i < count(); ++i) {
      if (partial == nullptr) {
        store_result(i);
      } else {
        R* to = partial + int64_t{i} * (p_.shape.value_dim + 2);
        __builtin_memcpy(to, out(i), p_.shape.value_dim * sizeof(R));
        to[p_.shape.value_dim] = s_.max[i];
        to[p_.shape.value_dim + 1] = s_.sum[i];
      }
    }
  }

  void merge(const R* const* partials, int number) {
    const int width = p_.shape.value_dim;
    for (int i = 0; i < count(); ++i) {
      start_row(i);
      const int64_t row = int64_t{i} * (width + 2);
      for (int n = 0; n < number; ++n) {
        s_.max[i] = max(s_.max[i], partials[n][row + width]);
      }
      for (int n = 0; n < number; ++n) {
        const R* from = partials[n] + row;
        if (from[width + 1] == 0) continue;  // saw nothing
        const R factor = exp2(splat((from[width] - s_.max[i]) * log2_scale_))[0];
        s_.sum[i] += factor * from[width + 1];
        for (int h = 0; h < width; ++h) out(i)[h] += factor * from[h];
      }
      store_result(i);
    }
  }

 private:
  int count() const { return static_cast<int>(rows_.end - rows_.begin); }
  R* out(int i) { return s_.out + i * kHeadPitch<R>; }

  void start_row(int i) {
    const int64_t row = rows_.begin + i;
    const int width = p_.shape.head_dim;
    if (!view_.keys(row).empty()) {
      read_row(p_.dtype, element(p_.q, p_.dtype, view_.row_index(row, width)), width,
               s_.q + i * kHeadPitch<R>);
    }
    fill(out(i), kHeadPitch<R>, R(0));
    s_.max[i] = -kInf;
    s_.sum[i] = 0;
  }

  void load_keys(Range keys) {
    for (int i = 0; i < kDecodeTile; ++i) {
      const int key = keys.begin + i;
      const int64_t row = key < keys.end ? p_.key_row(head_.b, key) : -1;
      s_.hidden[i] = row < 0;
      load_row(p_.k, row, p_.shape.head_dim, s_.k + i * kHeadPitch<R>);
      load_row(p_.v, row, p_.shape.value_dim, s_.v + i * kHeadPitch<R>);
    }
  }
  void load_row(const void* base, int64_t row, int width, R* to) {
    if (row < 0) {
      fill(to, kHeadPitch<R>, R(0));
    } else {
      read_row(p_.dtype, element(base, p_.dtype, (row * p_.shape.kv_heads + head_.k) * width),
               width, to);
    }
  }

  // Steps 2 to 4 of one row and one tile.
  void visit(Range tile, int i) {
    const Range seen = view_.keys(rows_.begin + i);
    const int begin = max(seen.begin, tile.begin) - tile.begin;
    const int end = min(seen.end, tile.end) - tile.begin;
    if (begin >= end) return;
    const int first = begin / kN * kN, last = static_cast<int>(round_up(end, kN));
    Vec<R> largest = splat(s_.max[i]);
    for (int k = first; k < last; k += kN) {
      const Vec<Index> key = iota<Index>() + Index(k);
      const auto sees = (key >= Index(begin)) & (key < Index(end)) & (load(s_.hidden + k) == 0);
      const Vec<R> s = sees ? scores(i, k) : splat(-kInf);
      largest = max(largest, s);
      store(s_.scores + k, s);
    }
    R now = largest[0];
    for (int j = 1; j < kN; ++j) now = max(now, largest[j]);
    if (now == -kInf) return;  // pages alone that are missing

    const Vec<R> rescale = exp2(splat((s_.max[i] - now) * log2_scale_));
    Vec<R> sum = {};
    for (int k = first; k < last; k += kN) {
      const Vec<R> p = exp2((load(s_.scores + k) - now) * log2_scale_);
      sum += p;
      store(s_.scores + k, p);
    }
    s_.max[i] = now;
    s_.sum[i] *= rescale[0];
    for (int j = 0; j < kN; ++j) s_.sum[i] += sum[j];
    add_values(i, begin, end, rescale);
  }

  // S of row i and the vector of keys at k of the tile.
  Vec<R> scores(int i, int k) {
    const R* q = s_.q + i * kHeadPitch<R>;
    const R* keys = s_.k + k * kHeadPitch<R>;
    Vec<R> sums[kN] = {};
    for (int h = 0; h < p_.shape.head_dim; h += kN) {
      const Vec<R> qh = load(q + h);
#pragma GCC unroll 16
      for (int j = 0; j < kN; ++j) sums[j] += qh * load(keys + j * kHeadPitch<R> + h);
    }
    transpose<R>(sums);
    Vec<R> s = sums[0];
#pragma GCC unroll 16
    for (int j = 1; j < kN; ++j) s += sums[j];
    return s;
  }

  // O = rescale O + P V over the keys in [begin, end), a few vectors of columns at a time.
  void add_values(int i, int begin, int end, Vec<R> rescale) {
    for (int h = 0; h < p_.shape.value_dim; h += 8 * kN) {
      const bool wide = p_.shape.value_dim - h > 4 * kN;
      wide ? add_columns<8>(i, h, begin, end, rescale) : add_columns<4>(i, h, begin, end, rescale);
    }
  }
  template <int kVecs>
  void add_columns(int i, int h, int begin, int end, Vec<R> rescale) {
    R* const o = out(i) + h;
    Vec<R> sums[kVecs];
#pragma GCC unroll 8
    for (int c = 0; c < kVecs; ++c) sums[c] = load(o + c * kN) * rescale;
    for (int k = begin; k < end; ++k) {
      const R* const v = s_.v + k * kHeadPitch<R> + h;
      const Vec<R> p = splat(s_.scores[k]);
#pragma GCC unroll 8
      for (int c = 0; c < kVecs; ++c) sums[c] += p * load(v + c * kN);
    }
#pragma GCC unroll 8
    for (int c = 0; c < kVecs; ++c) store(o + c * kN, sums[c]);
  }

  void store_result(int i) {
    const int64_t row = rows_.begin + i;
    const int width = p_.shape.value_dim;
    const bool empty = s_.sum[i] == 0;
    write_row(p_.dtype, out(i), empty ? R(0) : 1 / s_.sum[i], width,
              element(p_.out, p_.dtype, view_.row_index(row, width)));
    static_cast<R*>(p_.lse)[view_.statistic_index(row, p_.shape.query_len)] =
        empty ? -kInf : static_cast<R>(s_.max[i] * p_.scale + __builtin_log(s_.sum[i]));
  }

  const DecodeProblem& p_;
  DecodeScratch<R>& s_;
  HeadView view_;
  Head head_;
  Rows rows_;
  R log2_scale_;
};

template <class R>
void run_part(const DecodeProblem& problem, Head head, Rows rows, Range keys, void* partial,
              void* scratch) {
  Decode<R>(problem, head, rows, *static_cast<DecodeScratch<R>*>(scratch))
      .part(keys, static_cast<R*>(partial));
}

template <class R>
void run_merge(const DecodeProblem& problem, Head head, Rows rows, const void* const* partials,
               int count, void* scratch) {
  Decode<R>(problem, head, rows, *static_cast<DecodeScratch<R>*>(scratch))
      .merge(reinterpret_cast<const R* const*>(partials), count);
}

template <class R>
constexpr DecodeKernel kKernel = {sizeof(DecodeScratch<R>), sizeof(R), run_part<R>, run_merge<R>};

}  // namespace

namespace JAX_FLASH2_CPU_ISA {
extern const DecodeKernels decode_kernels;
const DecodeKernels decode_kernels = {.single = kKernel<float>, .real64 = kKernel<double>};
}  // namespace JAX_FLASH2_CPU_ISA

}  // namespace jax_flash2::cpu
