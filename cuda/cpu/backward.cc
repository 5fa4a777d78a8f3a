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
// `rows`, one task a block of rows (split): the same from the other side, dQ stays in scratch
// memory:
//     S^T = K Q^T, dP^T = V dO^T, dQ += dS K.
#include "cpu/rows.h"

namespace jax_flash2::cpu {
namespace {

template <class Unit>
struct BackwardScratch {
  using R = Real<Unit>;
  static constexpr int kHeadTile = kKeyBlock * kHeadPitch<R>;
  // Blocks of keys or rows, by rows and transposed in panels.
  alignas(64) Unit k[kHeadTile], v[kHeadTile], q[kHeadTile], dout[kHeadTile];
  Unit transposed_a[kKeyBlock * kMaxHeadDim], transposed_b[kKeyBlock * kMaxHeadDim];
  R p[kKeyBlock * kScorePitch], ds[kKeyBlock * kScorePitch];
  R dk[kHeadTile], dv[kHeadTile], dq[kHeadTile];
  R lse[kRowBlock], delta[kRowBlock];
  LaneInt<R> lo[kRowBlock], hi[kRowBlock];  // each row sees keys [lo, hi)
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
        read_row(p_.dtype, element(p_.out, p_.dtype, at), width, s_.q);
        read_row(p_.dtype, element(p_.dout, p_.dtype, at), width, s_.dout);
        Vec<R> sum = {};
        for (int i = 0; i < width; i += kN) sum += load(s_.q + i) * load(s_.dout + i);
        for (int i = 0; i < kN; ++i) delta += sum[i];
        delta -= dlse[statistic];
        if (lse[statistic] != -kInf) scaled_lse = lse[statistic] * static_cast<R>(kLog2E);
      }
      const int64_t to = view_.statistic_index(row, padded_tokens_);
      static_cast<R*>(p_.delta)[to] = delta;
      static_cast<R*>(p_.scaled_lse)[to] = scaled_lse;
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
    transpose_to_panels(s_.q, columns, p_.shape.head_dim, s_.transposed_a);
    transpose_to_panels(s_.dout, columns, p_.shape.value_dim, s_.transposed_b);
    for (int i = 0; i < columns; ++i) fill(s_.dq + i * kHeadPitch<R>, padded_head(), R(0));

    const Range seen = view_.band().keys_of(tokens);
    for (int first = seen.begin; first < seen.end; first += kKeyBlock) {
      const Range real = {first, min(first + kKeyBlock, seen.end)};
      load_keys(real, real);
      const int loaded = static_cast<int>(round_up(real.end - first, 8));
      const Range keys = {first, first + loaded};
      gemm<Form::kScores, Unit>(loaded, columns, p_.shape.head_dim, s_.k, s_.transposed_a, s_.p);
      gemm<Form::kScores, Unit>(loaded, columns, p_.shape.value_dim, s_.v, s_.transposed_b, s_.ds);
      for (int j = 0; j < columns; j += kN) {
        const Vec<R> lse = load(s_.lse + j), delta = load(s_.delta + j);
        for (int k = 0; k < loaded; ++k) {
          const int at = k * kScorePitch + j;
          store(s_.ds + at, exp2(load(s_.p + at) * log2_scale_ - lse) * (load(s_.ds + at) - delta));
        }
      }
      const bool partial = !view_.band().covers(tokens, keys);
      if (partial) mask_transposed<R>(s_.ds, keys, columns, s_.lo, s_.hi, 0);
      const auto product = partial && tainted_keys_ ? gemm_skipping_zeros<Form::kOuter, Unit>
                                                    : gemm<Form::kOuter, Unit>;
      product(static_cast<int>(round_up(count, 8)), padded_head(), loaded, s_.ds, s_.k, s_.dq,
              Update::kAdd, nullptr);
    }
    for (int i = 0; i < count; ++i) {
      if (s_.lo[i] < s_.hi[i]) write_dq(rows.begin + i, s_.dq + i * kHeadPitch<R>);
    }
  }

 private:
  int padded_head() const { return static_cast<int>(round_up(p_.shape.head_dim, kN)); }
  int padded_value() const { return static_cast<int>(round_up(p_.shape.value_dim, kN)); }

  // Loads K and V of `block`; what lies outside `seen`, up to a whole vector, is 0.
  void load_keys(Range block, Range seen) {
    const int rows = static_cast<int>(round_up(block.end - block.begin, max(kN, 8)));
    for (int i = 0; i < rows; ++i) {
      const int key = block.begin + i;
      const bool real = key >= seen.begin && key < seen.end;
      load_row(p_.k, real, view_.key_index(key, p_.shape.head_dim), p_.shape.head_dim,
               s_.k + i * kHeadPitch<R>);
      load_row(p_.v, real, view_.key_index(key, p_.shape.value_dim), p_.shape.value_dim,
               s_.v + i * kHeadPitch<R>);
    }
    tainted_keys_ = holds_non_finite(s_.k, kHeadPitch<R>, rows, p_.shape.head_dim);
  }
  void load_row(const void* base, bool real, int64_t index, int width, R* to) {
    if (real) {
      read_row(p_.dtype, element(base, p_.dtype, index), width, to);
    } else {
      fill(to, static_cast<int>(round_up(width, kN)), R(0));
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
               s_.q + i * kHeadPitch<R>);
      load_row(p_.dout, real, view_.row_index(row, p_.shape.value_dim), p_.shape.value_dim,
               s_.dout + i * kHeadPitch<R>);
      const int64_t statistic = view_.statistic_index(row, padded_tokens_);
      s_.lse[i] = real ? static_cast<const R*>(p_.scaled_lse)[statistic] : kInf;
      s_.delta[i] = real ? static_cast<const R*>(p_.delta)[statistic] : R(0);
    }
    tainted_rows_ = holds_non_finite(s_.q, kHeadPitch<R>, padded, p_.shape.head_dim) ||
                    holds_non_finite(s_.dout, kHeadPitch<R>, padded, p_.shape.value_dim);
    return padded;
  }

  void begin_keys(Range block, Range seen) {
    load_keys(block, seen);
    const int rows = static_cast<int>(round_up(block.end - block.begin, max(kN, 8)));
    transpose_to_panels(s_.k, rows, p_.shape.head_dim, s_.transposed_a);
    transpose_to_panels(s_.v, rows, p_.shape.value_dim, s_.transposed_b);
    for (int i = 0; i < rows; ++i) {
      fill(s_.dk + i * kHeadPitch<R>, padded_head(), R(0));
      fill(s_.dv + i * kHeadPitch<R>, padded_value(), R(0));
    }
  }

  // Step 2 for one block of rows, which sees keys [seen.begin, seen.end) in all.
  void visit_rows(Range block, Range seen, Rows rows, int* turn) {
    const int count = load_rows(rows);
    // Whole panels of keys; whatever they hold beyond the band is masked.
    constexpr int kStep = kPanel<Unit> > 8 ? kPanel<Unit> : 8;
    const int begin = max(seen.begin - block.begin, 0) / kStep * kStep;
    const int columns =
        static_cast<int>(round_up(min(seen.end, block.end) - block.begin - begin, max(kN, 8)));
    const Range keys = {block.begin + begin, block.begin + begin + columns};
    const Range tokens = view_.tokens(rows);
    const int head_dim = p_.shape.head_dim, value_dim = p_.shape.value_dim;

    gemm<Form::kScores, Unit>(count, columns, head_dim, s_.q, s_.transposed_a + begin * head_dim,
                              s_.p);
    gemm<Form::kScores, Unit>(count, columns, value_dim, s_.dout,
                              s_.transposed_b + begin * value_dim, s_.ds);
    const bool partial = !view_.band().covers(tokens, keys);
    for (int i = 0; i < count; ++i) softmax_gradient(i, columns, partial, keys.begin);

    const bool skip = partial && tainted_rows_;
    const auto outer = skip ? gemm_skipping_zeros<Form::kOuter, Unit> : gemm<Form::kOuter, Unit>;
    outer(columns, padded_value(), count, s_.p, s_.dout, s_.dv + begin * kHeadPitch<R>,
          Update::kAdd, nullptr);
    outer(columns, padded_head(), count, s_.ds, s_.q, s_.dk + begin * kHeadPitch<R>, Update::kAdd,
          nullptr);
    if (turn != nullptr) {
      const auto inner = partial && tainted_keys_ ? gemm_skipping_zeros<Form::kInner, Unit>
                                                  : gemm<Form::kInner, Unit>;
      inner(count, padded_head(), columns, s_.ds, s_.k + begin * kHeadPitch<R>, s_.dq,
            Update::kStore, nullptr);
      add_dq(block.begin / kKeyBlock, seen, rows, turn);
    }
  }

  // P and dS of row i, from S and dP.
  void softmax_gradient(int i, int columns, bool partial, int first_key) {
    R* p = s_.p + i * kScorePitch;
    R* ds = s_.ds + i * kScorePitch;
    const R lse = s_.lse[i], delta = s_.delta[i];
    for (int j = 0; j < columns; j += kN) {
      Vec<R> pj = exp2(load(p + j) * log2_scale_ - lse);
      Vec<R> dsj = pj * (load(ds + j) - delta);
      if (partial) {
        const auto key = iota<LaneInt<R>>() + LaneInt<R>(first_key + j);
        const auto allowed = (key >= s_.lo[i]) & (key < s_.hi[i]);
        pj = allowed ? pj : Vec<R>{};
        dsj = allowed ? dsj : Vec<R>{};
      }
      store(p + j, pj);
      store(ds + j, dsj);
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
  bool tainted_keys_ = false, tainted_rows_ = false;  // what is loaded holds NaN or Inf
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
const BackwardKernels backward_kernels = {.single = kKernel<float>, .real64 = kKernel<double>};
}  // namespace JAX_FLASH2_CPU_ISA

}  // namespace jax_flash2::cpu
