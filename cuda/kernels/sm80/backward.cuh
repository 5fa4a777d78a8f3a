// The backward for sm_80 and newer: dK, dV and dQ from one kernel (FlashAttention-2, algorithm 2).
//
// One thread block owns `block_k` keys of one K/V head, and the query heads of its group or a part of
// them. It walks over these heads and, in each, over the tiles of queries that see its keys, so that
// dK and dV stay in registers from the first step to the last. Step numbers as in cuda/README.md:
//   1  choose the keys, ask the band for the range of rows that see them; load K, V and the first
//      step
//   For every query head and every tile of queries, last rows first:
//   2  wait for Q, dO, LSE and D; with two stages, start loading those of the next step
//   3  S = Q K^T, P = exp(scale S - LSE), hidden elements of P become 0; P to shared memory
//   4  dP = dO V^T, dS = P (dP - D); dS to shared memory
//   5  dV += P^T dO
//   6  dK += dS^T Q; with one stage, start loading the next step
//   7  dQ = dS K, added to the float32 sums in global memory. Deterministic mode: in the order of
//      the key blocks, by a counter a tile of queries. Split mode: not at all
//   8  scale dK and dV through shared memory to global memory; those of a part of a group, in
//      float32, to the workspace where kernels/any/sum_dkv.cuh finds them
//
// Deterministic mode waits only for thread blocks of the same head with lower keys. Those have
// lower block indices, so that the hardware starts them first: they never wait for one that has no
// room. Rows are walked downwards because key block n of a causal mask then begins where n - 1 has
// just been.
#pragma once

#include "device/dq_accum.cuh"
#include "kernels/sm80/backward_common.cuh"

namespace jax_flash2::sm80 {

// A kernel's one template argument: the Math and the tile. (nvcc 13.0 cannot name a kernel whose
// own argument is a struct's value.)
template <typename Math_, int kHeadDim, int kSharedClass>
struct BackwardConfig {
  using Math = Math_;
  static constexpr int kElement = int(sizeof(typename Math::Element));
  static constexpr BackwardTile kTile =
      backward_tile(kHeadDim, kElement, kSharedClasses[kSharedClass]);
  // False if no device that runs code compiled for `arch` would choose this tile: the kernel then
  // needs no body.
  static constexpr bool needed(int arch) { return tile_needed(kTile, kElement, arch); }
};

template <typename Config>
struct BackwardShared {
  static constexpr BackwardTile kTile = Config::kTile;
  using Element = typename Config::Math::Element;
  // Also dK and dV on their way out.
  using KvTile = SmemTile<Element, kTile.block_k, kTile.head_dim>;
  using QTile = SmemTile<Element, kTile.block_q, kTile.head_dim>;        // Q, dO
  using PTile = SmemTile<Element, kTile.block_q, kTile.block_k>;         // P, dS
  static constexpr int kRowsBytes = kTile.block_q * int(sizeof(float));  // LSE or D
  static constexpr int kStageBytes = 2 * QTile::kBytes,
                       kPBytes = (kTile.p_in_ds ? 1 : 2) * PTile::kBytes;
  static constexpr int kBytes =
      2 * KvTile::kBytes + kTile.stages * kStageBytes + kPBytes + kTile.stages * 2 * kRowsBytes;
  static_assert(kBytes == shared_bytes(kTile, sizeof(Element)),
                "shared_bytes() decides where a tile may run");
  static_assert(KvTile::kBytes % 1024 == 0 && QTile::kBytes % 1024 == 0 &&
                    PTile::kBytes % 1024 == 0,
                "the swizzle wants every tile aligned to 1024 bytes");

  uint32_t base;
  JF2_DEVICE KvTile k() const { return {base}; }
  JF2_DEVICE KvTile v() const { return {base + KvTile::kBytes}; }
  JF2_DEVICE QTile q(int stage) const { return {base + 2 * KvTile::kBytes + stage * kStageBytes}; }
  JF2_DEVICE QTile dout(int stage) const { return {q(stage).base + QTile::kBytes}; }
  JF2_DEVICE PTile ds() const { return {q(kTile.stages).base}; }
  JF2_DEVICE PTile p() const { return {ds().base + kPBytes - PTile::kBytes}; }
  JF2_DEVICE uint32_t lse(int stage) const { return ds().base + kPBytes + stage * 2 * kRowsBytes; }
  JF2_DEVICE uint32_t delta(int stage) const { return lse(stage) + kRowsBytes; }
};

// What a warp computes of each product.
template <typename Config>
struct WarpParts {
  static constexpr BackwardTile kTile = Config::kTile;
  static constexpr WarpGrid kScores = kTile.scores, kDkv = kTile.dkv, kDq = kTile.dq;
  static constexpr int kScoreWarps = kScores.rows * kScores.cols;
  static_assert(kScoreWarps <= kTile.warps && kDkv.rows * kDkv.cols == kTile.warps &&
                    kDq.rows * kDq.cols == kTile.warps,
                "every warp has a part of dK, dV and dQ");
  static constexpr int kScoresM = kTile.block_q / kScores.rows;  // S and dP
  static constexpr int kScoresN = kTile.block_k / kScores.cols;
  static constexpr int kDkvM = kTile.block_k / kDkv.rows, kDkvN = kTile.head_dim / kDkv.cols;
  static constexpr int kDqM = kTile.block_q / kDq.rows, kDqN = kTile.head_dim / kDq.cols;

  int lane;
  bool has_scores;
  int scores_row, scores_col;
  int dkv_row, dkv_piece;  // a piece is 16 columns, see Interleaved
  int dq_row, dq_piece;

  JF2_DEVICE explicit WarpParts(unsigned thread) {
    const unsigned warp = thread / 32;
    lane = int(thread % 32);
    has_scores = kScoreWarps == kTile.warps || warp < kScoreWarps;
    scores_row = int(warp / kScores.cols * kScoresM);
    scores_col = int(warp % kScores.cols * kScoresN);
    dkv_row = int(warp / kDkv.cols * kDkvM);
    dkv_piece = int(warp % kDkv.cols);
    dq_row = int(warp / kDq.cols * kDqM);
    dq_piece = int(warp % kDq.cols);
  }
};

template <typename Config>
using DkvAccumulators = Accumulators<WarpParts<Config>::kDkvM, WarpParts<Config>::kDkvN>;

// The keys of a thread block that some row sees.
template <typename Config>
JF2_DEVICE Range seen_keys(const Band& band, int key0) {
  const Range seen = band.keys_of({0, band.query_length});
  return {max(key0, seen.begin), min(key0 + Config::kTile.block_k, seen.end)};
}

// Step 8 for a part of a group: a warp's share of dK or dV, times `scale`, to rows and columns of
// `target` as store_interleaved would place them in a tile, but straight from the registers. Rows of
// the tile outside `live` become zeros, those past `end` do not exist.
template <int kStride, int kM, int kN>
JF2_DEVICE void store_partial(GlobalMatrix<float> target, int row, int piece,
                              const Accumulators<kM, kN>& c, float scale, Range live, int end,
                              int lane) {
#pragma unroll
  for (int r = 0; r < kM / 8; ++r) {
    const int i = row + r * 8 + (lane >> 2);
    if (i >= end) break;
    const bool alive = contains(live, i);
    float* const to = target.data + i * target.row_stride;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const int col = (piece + j / 2 * kStride) * 16 + j % 2 * 8 + (lane & 3) * 2;
      if (col >= target.cols) break;
      const float x = c.x[r / 2][j][r % 2 * 2], y = c.x[r / 2][j][r % 2 * 2 + 1];
      *reinterpret_cast<float2*>(to + col) =
          alive ? make_float2(x * scale, y * scale) : make_float2(0.f, 0.f);
    }
  }
}

// Step 8, after a barrier: dK and dV of the thread block out to global memory.
template <typename Config>
JF2_DEVICE void store_dkv(const BackwardProblem& problem, const BackwardPlan& plan,
                          const BackwardShared<Config>& shared, DkvAccumulators<Config>& dk,
                          DkvAccumulators<Config>& dv) {
  using Element = typename Config::Math::Element;
  constexpr BackwardTile kTile = Config::kTile;
  constexpr int kThreads = kTile.warps * 32, kCols = kTile.dkv.cols;
  const Shape& shape = problem.shape;
  // Asked for anew, so that it holds no registers during the steps.
  const BackwardWork work(plan, shape.kv_heads * problem.group_splits, shape.batch,
                          ptx::opaque(int(blockIdx.x)));
  const Band band = problem.band.at(work.sequence, shape.query_len, shape.kv_len);
  const int key0 = work.block * kTile.block_k, thread = ptx::thread_index();
  const Range keys = seen_keys<Config>(band, key0);
  const Range live = {keys.begin - key0, keys.end - key0};
  const WarpParts<Config> part(thread);
  if (problem.dkv_partial != nullptr) {
    const int64_t cols = shape.head_dim + shape.value_dim, stride = shape.kv_heads * cols;
    const int split = work.head % problem.group_splits, head = work.head / problem.group_splits;
    float* const rows =
        problem.dkv_partial +
        ((int64_t(work.sequence) * problem.group_splits + split) * shape.kv_len + key0) * stride +
        head * cols;
    const int end = shape.kv_len - key0;
    store_partial<kCols>({rows, stride, shape.head_dim}, part.dkv_row, part.dkv_piece, dk,
                         plan.scale, live, end, part.lane);
    store_partial<kCols>({rows + shape.head_dim, stride, shape.value_dim}, part.dkv_row,
                         part.dkv_piece, dv, 1.f, live, end, part.lane);
    return;
  }
  store_interleaved<kCols>(shared.k(), part.dkv_row, part.dkv_piece, dk, plan.scale, live,
                           part.lane);
  store_interleaved<kCols>(shared.v(), part.dkv_row, part.dkv_piece, dv, 1.f, live, part.lane);
  __syncthreads();  // dK and dV of all warps are there
  store_tile<kThreads>(head_matrix<Element>(problem.dk, work.sequence, shape.kv_len, shape.kv_heads,
                                            work.head, shape.head_dim),
                       shared.k(), key0, {0, shape.kv_len}, thread);
  store_tile<kThreads>(head_matrix<Element>(problem.dv, work.sequence, shape.kv_len, shape.kv_heads,
                                            work.head, shape.value_dim),
                       shared.v(), key0, {0, shape.kv_len}, thread);
}

template <typename Config>
JF2_DEVICE void backward_block(const BackwardProblem& problem, const BackwardPlan& plan) {
  using Math = typename Config::Math;
  using Element = typename Math::Element;
  constexpr BackwardTile kTile = Config::kTile;
  using Shared = BackwardShared<Config>;
  using KvTile = typename Shared::KvTile;
  using QTile = typename Shared::QTile;
  using PTile = typename Shared::PTile;
  constexpr int kThreads = kTile.warps * 32, kHeadDim = kTile.head_dim;
  constexpr int kBlockQ = kTile.block_q, kBlockK = kTile.block_k;
  using Parts = WarpParts<Config>;
  constexpr int kDkvCols = kTile.dkv.cols, kDqCols = kTile.dq.cols;
  static_assert(kTile.stages == 1 || kTile.stages == 2, "the schedule knows one and two stages");

  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  const Shared shared = {ptx::shared_address(dynamic_shared)};

  // 1
  const Shape& shape = problem.shape;
  // Its heads are the parts of the groups: part w has the `heads` query heads from w * heads on.
  const BackwardWork work(plan, shape.kv_heads * problem.group_splits, shape.batch, blockIdx.x);
  const Band band = problem.band.at(work.sequence, shape.query_len, shape.kv_len);
  const int key0 = work.block * kBlockK;
  // Rows that see the keys. Asked for anew where it is needed, since it would hold registers.
  const auto seeing_rows = [&] {
    const int begin = ptx::opaque(key0);
    return band.rows_of({begin, begin + kBlockK});
  };
  const auto last_tile = [&] { return (seeing_rows().end - 1) / kBlockQ; };
  const int heads = shape.group() / problem.group_splits;
  const int first_head = work.head * heads, kv_head = work.head / problem.group_splits;
  const int end_head = seeing_rows().empty() ? first_head : first_head + heads;
  const auto padded_len = [&] { return int(round_up(ptx::opaque(shape.query_len), kTokenTile)); };
  // Row `row` of a head in the workspaces, [B, N, Tp].
  const auto padded_row = [&](int sequence, int head, int row) {
    return (int64_t(sequence) * shape.query_heads + head) * padded_len() + row;
  };

  const auto load_step = [&](int stage, int head, int tile) {
    const int row = tile * kBlockQ, thread = ptx::thread_index();
    const Range rows = seeing_rows();
    const int sequence = ptx::opaque(work.sequence);  // no products with it are kept between steps

    load_tile<kThreads>(shared.q(stage),
                        head_matrix<const Element>(problem.q, sequence, shape.query_len,
                                                   shape.query_heads, head, shape.head_dim),
                        row, rows, thread);
    load_tile<kThreads>(shared.dout(stage),
                        head_matrix<const Element>(problem.dout, sequence, shape.query_len,
                                                   shape.query_heads, head, shape.value_dim),
                        row, rows, thread);
    constexpr int kChunks = kBlockQ / 4;  // of 16 bytes
    static_assert(2 * kChunks <= kThreads, "a thread copies at most one chunk of LSE or D");
    if (thread < 2 * kChunks) {
      const int64_t flat_head = int64_t(sequence) * shape.query_heads + head;
      const int stat = thread < kChunks ? kScaledLse : kDelta;
      const int64_t offset =
          (flat_head * kRowStats + stat) * padded_len() + row + thread % kChunks * 4;
      ptx::cp_async_16(shared.lse(stage) + thread * 16,
                       static_cast<const float*>(problem.row_stats) + offset, 16);
    }
    ptx::cp_async_commit();
  };

  if (first_head < end_head) {
    const Range keys = seen_keys<Config>(band, key0);
    const int thread = ptx::thread_index();
    load_tile<kThreads>(shared.k(),
                        head_matrix<const Element>(problem.k, work.sequence, shape.kv_len,
                                                   shape.kv_heads, kv_head, shape.head_dim),
                        key0, keys, thread);
    load_tile<kThreads>(shared.v(),
                        head_matrix<const Element>(problem.v, work.sequence, shape.kv_len,
                                                   shape.kv_heads, kv_head, shape.value_dim),
                        key0, keys, thread);
    load_step(0, first_head, last_tile());
  }

  DkvAccumulators<Config> dk, dv;
  dk.zero();
  dv.zero();

  int head = first_head, tile = last_tile(), stage = 0;
  while (head < end_head) {
    const Range rows = seeing_rows();
    const bool head_done = tile == rows.begin / kBlockQ;
    const int next_head = head + head_done;
    const int next_tile = head_done ? (rows.end - 1) / kBlockQ : tile - 1;
    // 2: this step's tiles have landed for every thread, and no warp reads those of the last step,
    // P or dS any more.
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (kTile.stages == 2 && next_head < end_head) load_step(stage ^ 1, next_head, next_tile);

    // 3. Asked for anew, so that addresses do not hold registers from step to step.
    Parts part(ptx::thread_index());
    Accumulators<Parts::kScoresM, Parts::kScoresN> p, ds;
    const Range tile_rows = {tile * kBlockQ, (tile + 1) * kBlockQ};
    const bool masked = !band.covers(tile_rows, {key0, key0 + kBlockK});
    if (part.has_scores) {
      p.zero();
      gemm<kHeadDim>(
          p, OperandA<Math, QTile, Major::kKMajor>(shared.q(stage), part.scores_row, 0, part.lane),
          OperandB<Math, KvTile, Major::kKMajor>(shared.k(), part.scores_col, 0, part.lane));
      float of_row[Parts::kScoresM / 8];
#pragma unroll
      for (int r = 0; r < Parts::kScoresM / 8; ++r) {
        of_row[r] =
            ptx::lds_f32(shared.lse(stage) + (part.scores_row + r * 8 + (part.lane >> 2)) * 4);
      }
      probabilities(p, of_row, plan.scale_log2);
      if (masked)
        hide(p, band, tile_rows.begin + part.scores_row, key0 + part.scores_col, 0.f, part.lane);
      store_accumulators(shared.p(), part.scores_row, part.scores_col, p, 1.f, part.lane);

      // 4
      ds.zero();
      gemm<kHeadDim>(
          ds,
          OperandA<Math, QTile, Major::kKMajor>(shared.dout(stage), part.scores_row, 0, part.lane),
          OperandB<Math, KvTile, Major::kKMajor>(shared.v(), part.scores_col, 0, part.lane));
#pragma unroll
      for (int r = 0; r < Parts::kScoresM / 8; ++r) {
        of_row[r] =
            ptx::lds_f32(shared.delta(stage) + (part.scores_row + r * 8 + (part.lane >> 2)) * 4);
      }
      score_gradients(ds, p, of_row);
      if (masked) hide_gradients(ds, p);
      if (!kTile.p_in_ds)
        store_accumulators(shared.ds(), part.scores_row, part.scores_col, ds, 1.f, part.lane);
    }
    __syncthreads();  // P and dS of all warps are there

    // 5
    part = Parts(ptx::thread_index());
    gemm<kBlockQ>(dv,
                  OperandA<Math, PTile, Major::kOuterMajor>(shared.p(), 0, part.dkv_row, part.lane),
                  Interleaved<kDkvCols, OperandB<Math, QTile, Major::kOuterMajor>>{
                      {shared.dout(stage), 0, part.dkv_piece * 16, part.lane}});
    if constexpr (kTile.p_in_ds) {
      __syncthreads();  // no warp reads P any more
      if (part.has_scores) {
        store_accumulators(shared.ds(), part.scores_row, part.scores_col, ds, 1.f, part.lane);
      }
      __syncthreads();  // dS of all warps is there
    }

    // 6
    gemm<kBlockQ>(
        dk, OperandA<Math, PTile, Major::kOuterMajor>(shared.ds(), 0, part.dkv_row, part.lane),
        Interleaved<kDkvCols, OperandB<Math, QTile, Major::kOuterMajor>>{
            {shared.q(stage), 0, part.dkv_piece * 16, part.lane}});
    if constexpr (kTile.stages == 1) {
      __syncthreads();  // no warp reads Q, dO, LSE or D any more
      if (next_head < end_head) load_step(0, next_head, next_tile);
    }

    // 7
    if (problem.dq_accum != nullptr) {
      Accumulators<Parts::kDqM, Parts::kDqN> dq;
      dq.zero();
      gemm<kBlockK>(dq,
                    OperandA<Math, PTile, Major::kKMajor>(shared.ds(), part.dq_row, 0, part.lane),
                    Interleaved<kDqCols, OperandB<Math, KvTile, Major::kOuterMajor>>{
                        {shared.k(), 0, part.dq_piece * 16, part.lane}});
      const int64_t row = padded_row(work.sequence, head, tile_rows.begin);
      int* const turn =
          problem.semaphores == nullptr ? nullptr : problem.semaphores + row / kSemaphoreRows;
      if (turn != nullptr) {
        // The key blocks before this one that see the rows; all blocks agree, since keys_of and
        // rows_of are exact.
        const int before = work.block - band.keys_of(tile_rows).begin / kBlockK;
        if (ptx::thread_index() == 0) ptx::wait_for(turn, before);
        __syncthreads();  // the sums of the blocks before are visible to every thread
      }
      const int padded_dim = int(round_up(ptx::opaque(shape.head_dim), kHeadDimTile));
      float* const sums =
          ptx::opaque(dq_lane(static_cast<float*>(problem.dq_accum) +
                                  (row + part.dq_row) * padded_dim + part.dq_piece * 2 * kDqPiece,
                              part.lane));
      static_assert(kDqCols <= 4, "the columns of the warps' piece j share 64 columns of dq_accum");
#pragma unroll
      for (int i = 0; i < Parts::kDqM / 16; ++i) {
        float* const sums_i = ptx::opaque(sums + i * 16 * padded_dim);
#pragma unroll
        for (int j = 0; j < Parts::kDqN / 8; ++j) {
          const int piece = j / 2 * kDqCols * 2 + j % 2;
          // H may be far less than the tile's head dim where Hv is not.
          if (piece * 8 / kHeadDimTile * kHeadDimTile >= padded_dim) break;
          add_dq(sums_i + piece * kDqPiece, dq.x[i][j]);
        }
      }
      if (turn != nullptr) {
        __syncthreads();  // every thread has added
        if (ptx::thread_index() == 0) {
          __threadfence();
          ptx::red_release_add(turn, 1);
        }
      }
    }

    head = next_head;
    tile = next_tile;
    if (kTile.stages == 2) stage ^= 1;
  }

  // 8
  __syncthreads();  // no warp reads K or V any more
  store_dkv<Config>(problem, plan, shared, dk, dv);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kTile.warps * 32, Config::kTile.blocks_per_sm)
    backward_kernel(const __grid_constant__ BackwardProblem problem,
                    const __grid_constant__ BackwardPlan plan) {
#ifdef __CUDA_ARCH__
  if constexpr (Config::needed(__CUDA_ARCH__)) {
    backward_block<Config>(problem, plan);
  }
#endif
}

}  // namespace jax_flash2::sm80
