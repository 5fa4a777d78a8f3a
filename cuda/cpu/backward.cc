// The backward on the host. P is never stored: it is recomputed from Q, K and the log-sum-exp.
//
// `keys`, one task a block of keys of one key/value head (fused and deterministic: 5 products;
// split leaves out the last):
//  1. K^T, V^T and K of the block are packed once; dK and dV stay in scratch memory.
//  2. For each block of rows that sees any of the keys: S = Q K^T, P = exp2(c S - LSE log2(e)),
//     dP = dO V^T, dS = P (dP - D), dV += P^T dO, dK += dS^T Q, and scale * dS K is added to dQ.
//     The blocks of keys are added to a block of rows in rising order, whichever threads do it: so
//     every run gives the same bits. Tasks are claimed in that order too, so a task waits only for
//     tasks that are already running.
// `rows`, one task a block of rows (split): the same from the other side, S^T = K Q^T and
// dP^T = V dO^T; dQ += dS K stays in scratch memory.
#include "cpu/rows.h"

namespace jax_flash2::cpu {
namespace {

template <class Unit>
struct BackwardScratch {
  using R = Real<Unit>;
  static constexpr int kUnitTile = kKeyBlock * kHeadPitch<Unit>,
                       kRealTile = kKeyBlock * kHeadPitch<R>;
  static constexpr int kScoreTile = kKeyBlock * kScorePitch;
  // Blocks of keys or rows: by rows, and two of them transposed in panels.
  alignas(64) Unit k[kUnitTile], v[kUnitTile], q[kUnitTile], dout[kUnitTile];
  Unit transposed_a[kKeyBlock * kMaxHeadDim], transposed_b[kKeyBlock * kMaxHeadDim];
  R p[kScoreTile], ds[kScoreTile];
  R dk[kRealTile], dv[kRealTile], dq[kRealTile];
  R lse[kRowBlock], delta[kRowBlock];
  LaneInt<R> lo[kRowBlock], hi[kRowBlock];  // each row sees keys [lo, hi)
  // In pairs along the rows or keys, where a product runs over those.
  Unit paired_k[kIsPair<Unit> ? kRealTile / 2 : 1], paired_q[kIsPair<Unit> ? kRealTile / 2 : 1],
      paired_dout[kIsPair<Unit> ? kRealTile / 2 : 1];
  Unit paired_p[kIsPair<Unit> ? kScoreTile / 2 : 1], paired_ds[kIsPair<Unit> ? kScoreTile / 2 : 1],
      ds_by_rows[kIsPair<Unit> ? kScoreTile / 2 : 1];
};

template <class Unit>
class Backward {
  using R = Real<Unit>;
  using Scratch = BackwardScratch<Unit>;
  static constexpr int kN = kLanes<R>;
  static constexpr R kInf = static_cast<R>(__builtin_inf());

 public:
  Backward(const BackwardProblem& problem, Head head, Scratch& scratch)
      : p_(problem),
        s_(scratch),
        head_(head),
        view_(problem.shape, problem.dtype, problem.band, head),
        padded_tokens_(round_up(problem.shape.query_len, kTokenTile)),
        log2_scale_(static_cast<R>(problem.scale * kLog2E)) {}

  void prepare(Rows rows) {
    const int width = p_.shape.value_dim;
    const auto* lse = static_cast<const R*>(p_.lse);
    const auto* dlse = static_cast<const R*>(p_.dlse);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      R delta = 0, scaled_lse = kInf;
      if (view_.keys(row).empty()) {
        write_dq(row, nullptr);
      } else {
        const int64_t at = view_.row_index(row, width);
        const int64_t statistic = view_.statistic_index(row, p_.shape.query_len);
        read_row(p_.dtype, element(p_.out, p_.dtype, at), width, s_.dk);
        read_row(p_.dtype, element(p_.dout, p_.dtype, at), width, s_.dv);
        Vec<R> sum = {};
        for (int i = 0; i < width; i += kN) sum += load(s_.dk + i) * load(s_.dv + i);
        for (int i = 0; i < kN; ++i) delta += sum[i];
        delta -= dlse[statistic];
        if (lse[statistic] != -kInf) scaled_lse = lse[statistic] * static_cast<R>(kLog2E);
      }
      row_stat(row, kDelta) = delta;
      row_stat(row, kScaledLse) = scaled_lse;
    }
  }

  void keys(int key_block, int* turns) {
    const int first = key_block * kKeyBlock;
    const Range block = {first, min(first + kKeyBlock, p_.shape.kv_len)};
    const Range all = view_.band().keys_of({0, p_.shape.query_len});
    const Range seen = {max(block.begin, all.begin), min(block.end, all.end)};
    begin_keys(block, seen);
    if (!seen.empty()) {
      const int64_t blocks = (view_.num_rows() + kRowBlock - 1) / kRowBlock;
      for (int64_t i = 0; i < blocks; ++i) {
        const Rows rows = {i * kRowBlock, min((i + 1) * kRowBlock, view_.num_rows())};
        const Range keys = view_.band().keys_of(view_.tokens(rows));
        if (keys.begin < block.end && keys.end > block.begin) {
          visit_rows(block, keys, rows, turns != nullptr ? turns + i : nullptr);
        }
      }
    }
    for (int i = 0; i < block.end - block.begin; ++i) {
      const int key = block.begin + i;
      write_row(p_.dtype, s_.dk + i * kHeadPitch<R>, static_cast<R>(p_.scale), p_.shape.head_dim,
                element(p_.dk, p_.dtype, view_.key_index(key, p_.shape.head_dim)));
      write_row(p_.dtype, s_.dv + i * kHeadPitch<R>, R(1), p_.shape.value_dim,
                element(p_.dv, p_.dtype, view_.key_index(key, p_.shape.value_dim)));
    }
  }

  void rows(Rows rows) {
    const int count = static_cast<int>(rows.end - rows.begin);
    const Range tokens = view_.tokens(rows);
    const int columns = load_rows(rows);
    transpose_to_panels(s_.q, columns, head_units(), s_.transposed_a);
    transpose_to_panels(s_.dout, columns, value_units(), s_.transposed_b);
    for (int i = 0; i < columns; ++i) fill(s_.dq + i * kHeadPitch<R>, padded_head(), R(0));

    const Range seen = view_.band().keys_of(tokens);
    for (int first = seen.begin; first < seen.end; first += kKeyBlock) {
      const Range real = {first, min(first + kKeyBlock, seen.end)};
      load_keys(real, real);
      const int loaded = static_cast<int>(round_up(real.end - first, 8));
      const Range keys = {first, first + loaded};
      gemm<Form::kScores, Unit>(loaded, columns, head_units(), s_.k, s_.transposed_a, s_.p);
      gemm<Form::kScores, Unit>(loaded, columns, value_units(), s_.v, s_.transposed_b, s_.ds);
      for (int j = 0; j < columns; j += kN) {
        const Vec<R> lse = load(s_.lse + j), delta = load(s_.delta + j);
        for (int k = 0; k < loaded; ++k) {
          const int at = k * kScorePitch + j;
          store(s_.ds + at, exp2(load(s_.p + at) * log2_scale_ - lse) * (load(s_.ds + at) - delta));
        }
      }
      const bool partial = !view_.band().covers(tokens, keys);
      if (partial) mask_transposed<R>(s_.ds, keys, columns, s_.lo, s_.hi, 0);
      if constexpr (kIsPair<Unit>) {
        for (int k = 0; k < loaded; k += 2) {
          for (int j = 0; j < columns; j += kN) {
            const R* at = s_.ds + k * kScorePitch + j;
            store(s_.paired_ds + k / 2 * kScorePitch + j,
                  pair_lanes(load(at), load(at + kScorePitch)));
          }
        }
      }
      const auto product = partial && tainted_keys_ ? gemm_skipping_zeros<Form::kOuter, Unit>
                                                    : gemm<Form::kOuter, Unit>;
      product(static_cast<int>(round_up(count, 8)), padded_head(), loaded / kDepth<Unit>,
              operand<Unit>(s_.ds, s_.paired_ds), operand(s_.k, s_.paired_k), s_.dq, Update::kAdd,
              nullptr);
    }
    for (int i = 0; i < count; ++i) {
      if (s_.lo[i] < s_.hi[i]) write_dq(rows.begin + i, s_.dq + i * kHeadPitch<R>);
    }
  }

 private:
  R& row_stat(int64_t row, RowStat stat) const {
    return static_cast<R*>(p_.row_stats)[view_.row_stat_index(row, stat, padded_tokens_)];
  }
  int padded_head() const { return static_cast<int>(round_up(p_.shape.head_dim, kN)); }
  int padded_value() const { return static_cast<int>(round_up(p_.shape.value_dim, kN)); }
  int head_units() const { return p_.shape.head_dim / kDepth<Unit>; }
  int value_units() const { return p_.shape.value_dim / kDepth<Unit>; }

  // Loads K and V of `block`; what lies outside `seen`, up to a whole vector, is 0.
  void load_keys(Range block, Range seen) {
    const int rows = static_cast<int>(round_up(block.end - block.begin, max(kN, 8)));
    for (int i = 0; i < rows; ++i) {
      const int key = block.begin + i;
      const bool real = key >= seen.begin && key < seen.end;
      load_row(p_.k, real, view_.key_index(key, p_.shape.head_dim), p_.shape.head_dim,
               s_.k + i * kHeadPitch<Unit>);
      load_row(p_.v, real, view_.key_index(key, p_.shape.value_dim), p_.shape.value_dim,
               s_.v + i * kHeadPitch<Unit>);
    }
    tainted_keys_ = holds_non_finite(s_.k, kHeadPitch<Unit>, rows, head_units());
    if constexpr (kIsPair<Unit>) pair_rows(s_.k, rows, p_.shape.head_dim, s_.paired_k);
  }
  void load_row(const void* base, bool real, int64_t index, int width, Unit* to) {
    if (real) {
      read_units(p_.dtype, element(base, p_.dtype, index), width, to);
    } else {
      fill(to, static_cast<int>(round_up(width / kDepth<Unit>, kN)), Unit(0));
    }
  }

  // Loads Q, dO, LSE, D and the mask of the rows. Rows that see nothing, and those up to a whole
  // vector, are 0, and so is their P.
  int load_rows(Rows rows) {
    const int padded = static_cast<int>(round_up(rows.end - rows.begin, max(kN, 8)));
    for (int i = 0; i < padded; ++i) {
      const int64_t row = rows.begin + i;
      const Range keys = row < rows.end ? view_.keys(row) : Range{0, 0};
      const bool real = !keys.empty();
      s_.lo[i] = keys.begin;
      s_.hi[i] = keys.end;
      load_row(p_.q, real, view_.row_index(row, p_.shape.head_dim), p_.shape.head_dim,
               s_.q + i * kHeadPitch<Unit>);
      load_row(p_.dout, real, view_.row_index(row, p_.shape.value_dim), p_.shape.value_dim,
               s_.dout + i * kHeadPitch<Unit>);
      s_.lse[i] = real ? row_stat(row, kScaledLse) : kInf;
      s_.delta[i] = real ? row_stat(row, kDelta) : R(0);
    }
    return padded;
  }

  void prefetch_row(int64_t row) {
    if (row >= view_.num_rows()) return;
    const int head_dim = p_.shape.head_dim, value_dim = p_.shape.value_dim;
    prefetch(element(p_.q, p_.dtype, view_.row_index(row, head_dim)), head_dim * size_of(p_.dtype));
    prefetch(element(p_.dout, p_.dtype, view_.row_index(row, value_dim)),
             value_dim * size_of(p_.dtype));
  }

  void begin_keys(Range block, Range seen) {
    load_keys(block, seen);
    const int rows = static_cast<int>(round_up(block.end - block.begin, max(kN, 8)));
    transpose_to_panels(s_.k, rows, head_units(), s_.transposed_a);
    transpose_to_panels(s_.v, rows, value_units(), s_.transposed_b);
    for (int i = 0; i < rows; ++i) {
      fill(s_.dk + i * kHeadPitch<R>, padded_head(), R(0));
      fill(s_.dv + i * kHeadPitch<R>, padded_value(), R(0));
    }
  }

  // Step 2 for one block of rows, which sees keys [seen.begin, seen.end) in all.
  void visit_rows(Range block, Range seen, Rows rows, int* turn) {
    const int count = load_rows(rows);
    if constexpr (kIsPair<Unit>) {
      pair_rows(s_.q, count, p_.shape.head_dim, s_.paired_q);
      pair_rows(s_.dout, count, p_.shape.value_dim, s_.paired_dout);
    }
    // Whole panels of keys; whatever they hold beyond the band is masked.
    constexpr int kStep = kPanel<Unit> > 8 ? kPanel<Unit> : 8;
    const int begin = max(seen.begin - block.begin, 0) / kStep * kStep;
    const int columns =
        static_cast<int>(round_up(min(seen.end, block.end) - block.begin - begin, max(kN, 8)));
    const Range keys = {block.begin + begin, block.begin + begin + columns};

    gemm<Form::kScores, Unit>(count, columns, head_units(), s_.q,
                              s_.transposed_a + begin * head_units(), s_.p);
    gemm<Form::kScores, Unit>(count, columns, value_units(), s_.dout,
                              s_.transposed_b + begin * value_units(), s_.ds);
    const bool partial = !view_.band().covers(view_.tokens(rows), keys);
    for (int i = 0; i < count; i += kDepth<Unit>) {
      for (int d = 0; d < kDepth<Unit>; ++d) prefetch_row(rows.end + i + d);
      for (int j = 0; j < columns; j += kN) softmax_gradient(i, j, partial, keys.begin + j);
    }

    const bool skip =
        partial && (holds_non_finite(s_.q, kHeadPitch<Unit>, count, head_units()) ||
                    holds_non_finite(s_.dout, kHeadPitch<Unit>, count, value_units()));
    const auto outer = skip ? gemm_skipping_zeros<Form::kOuter, Unit> : gemm<Form::kOuter, Unit>;
    outer(columns, padded_value(), count / kDepth<Unit>, operand<Unit>(s_.p, s_.paired_p),
          operand(s_.dout, s_.paired_dout), s_.dv + begin * kHeadPitch<R>, Update::kAdd, nullptr);
    outer(columns, padded_head(), count / kDepth<Unit>, operand<Unit>(s_.ds, s_.paired_ds),
          operand(s_.q, s_.paired_q), s_.dk + begin * kHeadPitch<R>, Update::kAdd, nullptr);
    if (turn != nullptr) {
      const auto inner = partial && tainted_keys_ ? gemm_skipping_zeros<Form::kInner, Unit>
                                                  : gemm<Form::kInner, Unit>;
      inner(count, padded_head(), columns / kDepth<Unit>, operand<Unit>(s_.ds, s_.ds_by_rows),
            operand(s_.k, s_.paired_k) + begin / kDepth<Unit> * kHeadPitch<R>, s_.dq,
            Update::kStore, nullptr);
      add_dq(block.begin / kKeyBlock, seen, rows, turn);
    }
  }

  // P and dS from S and dP: of row i (and i + 1, if units are pairs), of a vector of keys.
  void softmax_gradient(int i, int j, bool partial, int first_key) {
    Vec<R> p[kDepth<Unit>], ds[kDepth<Unit>];
    for (int d = 0; d < kDepth<Unit>; ++d) {
      const int at = (i + d) * kScorePitch + j;
      p[d] = exp2(load(s_.p + at) * log2_scale_ - s_.lse[i + d]);
      ds[d] = p[d] * (load(s_.ds + at) - s_.delta[i + d]);
      if (partial) {
        const auto key = iota<LaneInt<R>>() + LaneInt<R>(first_key);
        const auto allowed = (key >= s_.lo[i + d]) & (key < s_.hi[i + d]);
        p[d] = allowed ? p[d] : Vec<R>{};
        ds[d] = allowed ? ds[d] : Vec<R>{};
      }
      if constexpr (kIsPair<Unit>) {
        store_as_pairs(s_.ds_by_rows + at / 2, ds[d]);
      } else {
        store(s_.p + at, p[d]);
        store(s_.ds + at, ds[d]);
      }
    }
    if constexpr (kIsPair<Unit>) {
      store(s_.paired_p + i / 2 * kScorePitch + j, pair_lanes(p[0], p[1]));
      store(s_.paired_ds + i / 2 * kScorePitch + j, pair_lanes(ds[0], ds[1]));
    }
  }

  // Adds the tile to dQ, when the blocks of keys before this one have been added.
  void add_dq(int key_block, Range seen, Rows rows, int* turn) {
    const int first = seen.begin / kKeyBlock, last = (seen.end - 1) / kKeyBlock;
    while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != key_block - first) yield();
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int i = static_cast<int>(row - rows.begin);
      if (s_.lo[i] >= s_.hi[i]) continue;
      R* tile = s_.dq + i * kHeadPitch<R>;
      R* sum = dq_sum(row);
      if (key_block > first) {
        for (int h = 0; h < p_.shape.head_dim; ++h) tile[h] += sum[h];
      }
      if (key_block == last) {
        write_dq(row, tile);
      } else {
        for (int h = 0; h < p_.shape.head_dim; ++h) sum[h] = tile[h];
      }
    }
    __atomic_store_n(turn, key_block - first + 1, __ATOMIC_RELEASE);
  }

  // Where the row's dQ is added up: in dq itself if that is of the right type.
  R* dq_sum(int64_t row) {
    const int width = p_.shape.head_dim;
    if (p_.dtype == DType::kFloat32 || p_.dtype == DType::kFloat64) {
      return static_cast<R*>(p_.dq) + view_.row_index(row, width);
    }
    return static_cast<R*>(p_.dq_accum) +
           view_.statistic_index(row, padded_tokens_) * round_up(width, kHeadDimTile);
  }
  // dQ of the row = scale * sum; 0 if there is no sum.
  void write_dq(int64_t row, const R* sum) {
    const int width = p_.shape.head_dim;
    if (sum == nullptr) fill(s_.dq, kHeadPitch<R>, R(0));
    write_row(p_.dtype, sum != nullptr ? sum : s_.dq, static_cast<R>(p_.scale), width,
              element(p_.dq, p_.dtype, view_.row_index(row, width)));
  }

  const BackwardProblem& p_;
  Scratch& s_;
  Head head_;
  HeadView view_;
  int64_t padded_tokens_;
  R log2_scale_;
  bool tainted_keys_ = false;  // the loaded keys hold NaN or Inf
};

template <class Unit>
Backward<Unit> make(const BackwardProblem& problem, Head head, void* scratch) {
  return Backward<Unit>(problem, head, *static_cast<BackwardScratch<Unit>*>(scratch));
}

template <class Unit>
constexpr BackwardKernel kKernel = {
    .scratch_bytes = sizeof(BackwardScratch<Unit>),
    .prepare = [](const BackwardProblem& problem, Head head, Rows rows,
                  void* scratch) { make<Unit>(problem, head, scratch).prepare(rows); },
    .keys = [](const BackwardProblem& problem, Head head, int key_block, int* turns,
               void* scratch) { make<Unit>(problem, head, scratch).keys(key_block, turns); },
    .rows = [](const BackwardProblem& problem, Head head, Rows rows,
               void* scratch) { make<Unit>(problem, head, scratch).rows(rows); }};

}  // namespace

namespace JAX_FLASH2_CPU_ISA {
extern const BackwardKernels backward_kernels;
const BackwardKernels backward_kernels = {
    .single = kKernel<float>, .real64 = kKernel<double>, .bfloat16 = kKernel<BFloat16Unit>};
}  // namespace JAX_FLASH2_CPU_ISA

}  // namespace jax_flash2::cpu
