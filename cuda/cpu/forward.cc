// The forward on the host: one task is a block of rows of one key/value head.
//
//  1. Q^T of the block is packed once: scores are computed transposed, S^T = K Q^T, so that a
//     vector holds neighbouring rows, and the softmax needs no sums across a vector.
//  2. The keys that any of the rows sees are visited in tiles; K and V of a tile are packed once
//     for all rows. Keys that no row sees are never read.
//  3. For each tile of rows: S^T, masked only where the band's edge crosses the tile; the running
//     maximum m; P = exp2(c (S - m)), c = scale * log2(e); the running sum l;
//     O = exp2(c (m' - m)) O + P V, m' being the maximum before. (One fused c S - c m would be
//     cheaper, and lose the row where the scores are so large that c m is rounded by more than 1.)
//  4. At the end O / l and LSE = scale m + log(l).
#include "cpu/rows.h"

namespace jax_flash2::cpu {
namespace {

inline constexpr int kKeyTile = 64;

template <class Unit>
struct RowTile {
  using R = Real<Unit>;
  alignas(64) Unit q[kRowTile * kMaxHeadDim / kDepth<Unit>];  // Q^T in panels
  R out[kRowTile * kHeadPitch<R>];                            // O, not yet divided by l
  R max[kRowTile], sum[kRowTile];                             // m and l
  LaneInt<R> lo[kRowTile], hi[kRowTile];                      // each row sees keys [lo, hi)
  int64_t first_row;
  Range tokens;
  int rows, columns;  // columns: rows up to whole vectors and register tiles
  bool started;       // out, max and sum hold something
};

template <class Unit>
struct ForwardScratch {
  using R = Real<Unit>;
  alignas(64) Unit k[kKeyTile * kHeadPitch<Unit>];
  Unit v[kKeyTile * kHeadPitch<Unit>];
  R scores[kKeyTile * kScorePitch];  // S^T, then P^T unless that is in pairs
  R rescale[kRowTile];
  Unit rows[kRowTile * kHeadPitch<Unit>];
  // V and P^T in pairs along the keys.
  Unit paired_v[kIsPair<Unit> ? kKeyTile / 2 * kHeadPitch<R> : 1];
  Unit paired_p[kIsPair<Unit> ? kKeyTile / 2 * kScorePitch : 1];
  RowTile<Unit> tiles[kMaxRowBlock / kRowTile];
};

template <class Unit>
class Forward {
  using R = Real<Unit>;
  using Scratch = ForwardScratch<Unit>;
  using Tile = RowTile<Unit>;
  static constexpr int kN = kLanes<R>;
  static constexpr R kInf = static_cast<R>(__builtin_inf());

 public:
  Forward(const ForwardProblem& problem, Head head, Scratch& scratch)
      : p_(problem),
        s_(scratch),
        view_(problem.shape, problem.dtype, problem.band, head),
        log2_scale_(static_cast<R>(problem.scale * kLog2E)) {}

  void run(Rows rows) {
    int tiles = 0;
    for (int64_t r = rows.begin; r < rows.end; r += kRowTile) {
      load_queries({r, min(r + kRowTile, rows.end)}, s_.tiles[tiles++]);
    }
    const Range keys = view_.band().keys_of(view_.tokens(rows));
    for (int k = keys.begin; k < keys.end; k += kKeyTile) {
      const Range tile = {k, min(k + kKeyTile, keys.end)};
      load_keys(tile);
      for (int key = tile.end; key < min(tile.end + kKeyTile, keys.end); ++key) prefetch_key(key);
      for (int i = 0; i < tiles; ++i) visit(tile, s_.tiles[i]);
    }
    for (int i = 0; i < tiles; ++i) store_results(s_.tiles[i]);
  }

 private:
  void load_queries(Rows rows, Tile& tile) {
    const int width = p_.shape.head_dim;
    tile.first_row = rows.begin;
    tile.tokens = view_.tokens(rows);
    tile.rows = static_cast<int>(rows.end - rows.begin);
    tile.columns = static_cast<int>(round_up(tile.rows, max(kN, 8)));
    tile.started = false;
    for (int i = 0; i < tile.columns; ++i) {
      const int64_t row = rows.begin + i;
      const Range keys = row < rows.end ? view_.keys(row) : Range{0, 0};
      tile.lo[i] = keys.begin;
      tile.hi[i] = keys.end;
      Unit* at = s_.rows + i * kHeadPitch<Unit>;
      if (keys.empty()) {
        fill(at, kHeadPitch<Unit>, Unit(0));
      } else {
        read_units(p_.dtype, element(p_.q, p_.dtype, view_.row_index(row, width)), width, at);
      }
    }
    transpose_to_panels(s_.rows, tile.columns, width / kDepth<Unit>, tile.q);
  }

  void load_keys(Range keys) {
    const int rows = static_cast<int>(round_up(keys.end - keys.begin, 8));
    for (int i = 0; i < rows; ++i) {
      load_key(p_.k, keys, i, p_.shape.head_dim, s_.k);
      load_key(p_.v, keys, i, p_.shape.value_dim, s_.v);
    }
    if constexpr (kIsPair<Unit>) pair_rows(s_.v, rows, p_.shape.value_dim, s_.paired_v);
  }
  void prefetch_key(int key) {
    const int head_dim = p_.shape.head_dim, value_dim = p_.shape.value_dim;
    prefetch(element(p_.k, p_.dtype, view_.key_index(key, head_dim)), head_dim * size_of(p_.dtype));
    prefetch(element(p_.v, p_.dtype, view_.key_index(key, value_dim)),
             value_dim * size_of(p_.dtype));
  }
  void load_key(const void* base, Range keys, int i, int width, Unit* tile) {
    Unit* at = tile + i * kHeadPitch<Unit>;
    if (keys.begin + i < keys.end) {
      read_units(p_.dtype, element(base, p_.dtype, view_.key_index(keys.begin + i, width)), width,
                 at);
    } else {
      fill(at, kHeadPitch<Unit>, Unit(0));
    }
  }
  // Step 3 for one tile of rows and one tile of keys.
  void visit(Range loaded, Tile& tile) {
    const Range seen = view_.band().keys_of(tile.tokens);
    const int begin = max(loaded.begin, seen.begin) - loaded.begin;
    const int end = min(loaded.end, seen.end) - loaded.begin;
    if (begin >= end) return;
    // Whole register tiles; whatever they hold beyond the band is masked.
    const int first = begin / 8 * 8, count = static_cast<int>(round_up(end, 8)) - first;
    const Range keys = {loaded.begin + first, loaded.begin + first + count};

    gemm<Form::kScores, Unit>(count, tile.columns, p_.shape.head_dim / kDepth<Unit>,
                              s_.k + first * kHeadPitch<Unit>, tile.q, s_.scores);
    const bool partial = !view_.band().covers(tile.tokens, keys);
    if (partial) mask_transposed<R>(s_.scores, keys, tile.columns, tile.lo, tile.hi, -kInf);
    for (int j = 0; j < tile.columns; j += kN) softmax(count, tile, j);

    const int rows = static_cast<int>(round_up(tile.rows, 8));
    const int columns = static_cast<int>(round_up(p_.shape.value_dim, kN));
    const bool skip = partial && holds_non_finite(s_.v + first * kHeadPitch<Unit>, kHeadPitch<Unit>,
                                                  count, p_.shape.value_dim / kDepth<Unit>);
    const auto product = skip ? gemm_skipping_zeros<Form::kOuter, Unit> : gemm<Form::kOuter, Unit>;
    product(rows, columns, count / kDepth<Unit>, operand<Unit>(s_.scores, s_.paired_p),
            operand(s_.v, s_.paired_v) + first / kDepth<Unit> * kHeadPitch<R>, tile.out,
            tile.started ? Update::kScaleAdd : Update::kStore, s_.rescale);
    tile.started = true;
  }

  void softmax(int keys, Tile& tile, int j) {
    R* column = s_.scores + j;
    Vec<R> largest = splat(-kInf);
    for (int k = 0; k < keys; ++k) largest = max(largest, load(column + k * kScorePitch));
    const Vec<R> before = tile.started ? load(tile.max + j) : splat(-kInf);
    const Vec<R> now = max(largest, before);
    // A row that has seen nothing yet: any finite shift makes its P zero.
    const Vec<R> shift = now == -kInf ? Vec<R>{} : now;
    const Vec<R> rescale = exp2((before - shift) * log2_scale_);
    Vec<R> sum = tile.started ? load(tile.sum + j) * rescale : Vec<R>{};
    for (int k = 0; k < keys; k += kDepth<Unit>) {
      const Vec<R> p = exp2((load(column + k * kScorePitch) - shift) * log2_scale_);
      sum += p;
      if constexpr (kIsPair<Unit>) {
        const Vec<R> next = exp2((load(column + (k + 1) * kScorePitch) - shift) * log2_scale_);
        sum += next;
        store(s_.paired_p + k / 2 * kScorePitch + j, pair_lanes(p, next));
      } else {
        store(column + k * kScorePitch, p);
      }
    }
    store(tile.max + j, now);
    store(tile.sum + j, sum);
    store(s_.rescale + j, rescale);
  }

  void store_results(const Tile& tile) {
    const int width = p_.shape.value_dim;
    R* lse = static_cast<R*>(p_.lse);
    for (int i = 0; i < tile.rows; ++i) {
      const int64_t row = tile.first_row + i;
      const bool empty = tile.lo[i] >= tile.hi[i] || tile.sum[i] == 0;
      if (empty) fill(s_.scores, kHeadPitch<R>, R(0));
      write_row(p_.dtype, empty ? s_.scores : tile.out + i * kHeadPitch<R>,
                empty ? R(0) : 1 / tile.sum[i], width,
                element(p_.out, p_.dtype, view_.row_index(row, width)));
      lse[view_.statistic_index(row, p_.shape.query_len)] =
          empty ? -kInf : static_cast<R>(tile.max[i] * p_.scale + __builtin_log(tile.sum[i]));
    }
  }

  const ForwardProblem& p_;
  Scratch& s_;
  HeadView view_;
  R log2_scale_;
};

template <class Unit>
void run_forward(const ForwardProblem& problem, Head head, Rows rows, void* scratch) {
  Forward<Unit>(problem, head, *static_cast<ForwardScratch<Unit>*>(scratch)).run(rows);
}

template <class Unit>
constexpr ForwardKernel kKernel = {sizeof(ForwardScratch<Unit>), run_forward<Unit>};

}  // namespace

namespace JAX_FLASH2_CPU_ISA {
extern const ForwardKernels forward_kernels;
const ForwardKernels forward_kernels = {
    .single = kKernel<float>, .real64 = kKernel<double>, .bfloat16 = kKernel<BFloat16Unit>};
}  // namespace JAX_FLASH2_CPU_ISA

}  // namespace jax_flash2::cpu
