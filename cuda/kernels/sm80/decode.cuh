// Decoding for sm_80 and newer: mma.sync, cp.async and ldmatrix, at the speed of memory.
//
// The rows of a block are all query heads of a group at all tokens (or as many as fit), so that
// keys and values are read once for them. Two warps load; the others split each tile by keys for
// the scores and by columns of V for the output: both products read every byte of the tile once,
// and no sums have to be exchanged at the end. Step numbers as in cuda/README.md:
//   1  find the block's part of the work (decode_work.cuh)
//   2  the warps that load: tile after tile, ahead of the others
//   The others, for every tile:
//   3  where a unit begins: its rows of Q to shared memory
//   4  wait for K
//   5  S = Q K^T, each warp its own keys; hidden elements become -inf; the warps exchange maxima
//   6  P = 2^(scale S - m) to shared memory; O and l brought to the new m if it moved by much
//   7  where a unit or the part ends: the sums of P, from each warp to all; wait for V; O += P V,
//      each warp its own columns
//   8  where a unit or the part ends: the result, or a piece of it (decode_merge.cuh)
//   9  where others have the rest of the last unit: their pieces and this block's, put together;
//      in a cluster, by all its blocks (kernels/sm80/decode_cluster.cuh)
#pragma once

#include "device/hide.cuh"
#include "kernels/sm80/decode_load.cuh"
#include "kernels/sm80/decode_merge.cuh"

namespace jax_flash2::sm80 {

// What the band hides of a warp's scores, which begin at key `key`, becomes -inf.
template <int kRows, int kKeys>
JF2_DEVICE void hide_keys(Accumulators<kRows, kKeys>& s, const Band& band, const DecodeRows& rows,
                          const DecodePlan& plan, int key, int lane) {
#pragma unroll
  for (int r = 0; r < kRows / 8; ++r) {
    const int token = rows.token(plan, ptx::opaque(lane >> 2) + r * 8);
    hide_in_row<kKeys>(seen_by(band, token, key, lane), -INFINITY,
                       [&](int j, int e) -> float& { return at(s, r, j, e); });
  }
}

// And the keys of 16 columns from 16 g on, which have no page.
template <int kRows, int kKeys>
JF2_DEVICE void hide_group(Accumulators<kRows, kKeys>& s, int g) {
#pragma unroll
  for (int r = 0; r < kRows / 8; ++r)
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
      if (j / 2 == g) at(s, r, j, 0) = at(s, r, j, 1) = -INFINITY;
}

// Blocks of a multiprocessor, for which ptxas has to leave registers. On sm_86 and sm_89 shared memory
// holds no second one.
template <typename Config>
constexpr int resident_blocks() {
#if __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890
  return 1;
#else
  return Config::kBlocks;
#endif
}

// Of clusters, which sm_90 brought (decode_cluster.cuh).
template <typename Config>
JF2_DEVICE void merge_in_cluster(const DecodeShared<Config>& shared, const DecodeProblem& problem,
                                 const DecodePlan& plan, const DecodeRows& rows, int thread);

template <typename Config>
__global__ void __launch_bounds__(kDecodeThreads, resident_blocks<Config>())
    decode_kernel(const __grid_constant__ DecodeProblem problem,
                  const __grid_constant__ DecodePlan plan) {
  using Math = typename Config::Math;
  using Element = typename Config::Element;
  using Shared = DecodeShared<Config>;
  using KvTile = typename Shared::KvTile;
  constexpr int kRows = Config::kRows, kKeys = Config::kKeys, kHeadDim = Config::kHeadDim;
  constexpr int kWarpKeys = Config::kWarpKeys, kWarpCols = Config::kWarpCols;
  constexpr int kLaneRows = RowStates<kRows>::kCount, kCluster = Config::kCluster;
  // m may lag behind the maximum by so much, in powers of two, before O and l are brought to it.
  constexpr float kMaxLag = 8.f;

  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  const Shared shared = {ptx::shared_address(dynamic_shared)};
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  static_assert(kDecodeStages <= kDecodeWarps,
                "the warps that compute make a stage's barriers each");
  if (lane == 0 && warp < kDecodeStages) shared.init_barriers(warp);

  // 1
  DecodePart part;
  if constexpr (kCluster > 1) {
    part = find_part_of_unit<kKeys, kCluster>(problem, plan);
  } else {
    part = find_part<kKeys>(problem, plan, lane);
    if (part.count == 0) return;
  }

  // 2
  if (warp >= kDecodeWarps && (kCluster == 1 || part.count > 0)) {
    if (problem.pages.table == nullptr) {
      run_loader<Config, false>(shared, problem, plan, part, warp - kDecodeWarps, lane);
    } else {
      run_loader<Config, true>(shared, problem, plan, part, warp - kDecodeWarps, lane);
    }
    return;
  }
  __syncthreads();  // the barriers are there
  if (warp >= kDecodeWarps) return;
  const auto meet = [] { ptx::barrier_sync(1, kDecodeWarps * 32); };  // the warps that compute
  const bool has_keys = warp < Config::kKeyWarps;
  const int col = warp * kWarpCols;

  const OperandA<Math, typename Shared::QTile, Major::kKMajor> q(shared.q(), 0, 0, lane);
  const OperandA<Math, typename Shared::PTile, Major::kKMajor> p(shared.p(), 0, 0, lane);
  Accumulators<kRows, kWarpCols> o;
  RowStates<kRows> state;
  if constexpr (kCluster > 1) {  // where nothing is left for this block
    o.zero();
    state.clear();
  }
  DecodeCursor<kKeys> here(problem, part.sequence, part.length, part.offset);
  DecodeRows rows(plan, part, here.sequence, here.unit, kRows);
  bool begins = false;  // this block has the beginning of the unit
  bool turns = true;    // to rows that it has not seen yet
  StageRing ring;

  for (int left = part.count; kCluster == 1 || left > 0; ring.advance(plan.stages)) {
    if (turns) {
      // 3: no warp reads the last Q any more, since all have met after it.
      rows = DecodeRows(plan, part, here.sequence, here.unit, kRows);
      begins = here.tile == 0;
      load_rows(shared, problem, plan, rows, thread);
      o.zero();
      state.clear();
      meet();  // Q is there
    }

    // 4, 5
    const int stage = ring.stage;
    ptx::mbarrier_wait(shared.full(stage, 0), ring.parity);
    Accumulators<kRows, kWarpKeys> s;
    s.zero();
    if (has_keys) {
      const int first = warp * kWarpKeys, key = here.first_key() + first;
      gemm<kHeadDim>(s, q, OperandB<Math, KvTile, Major::kKMajor>(shared.k(stage), first, 0, lane));
      if (!here.band.covers(rows.tokens(plan), {key, key + kWarpKeys})) {
        hide_keys(s, here.band, rows, plan, key, lane);
      }
      if (problem.pages.table != nullptr) {
#pragma unroll
        for (int g = 0; g < kWarpKeys / kPageMultiple; ++g) {
          if (shared.is_missing(stage, first / kPageMultiple + g)) hide_group(s, g);
        }
      }
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(shared.empty(stage, 0));
    }
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const float m = has_keys ? row_max(s, r) : -INFINITY;
      if (lane % 4 == 0) shared.give(r * 8 + (lane >> 2), warp, m);
    }
    meet();  // the maxima are there

    // 6
    float m[kLaneRows];
    bool keep = true;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const float4 x = shared.take(r * 8 + (lane >> 2));
      m[r] = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)) * plan.scale_log2;
      keep = keep && m[r] <= state.m[r] + kMaxLag;
    }
    if (!__all_sync(~0u, keep)) {
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) rescale(o, state, r, fmaxf(state.m[r], m[r]));
    }
    if (has_keys) {
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
#pragma unroll
        for (int j = 0; j < kWarpKeys / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = at(s, r, j, e);
            x = ptx::ex2(fmaf(x, plan.scale_log2, -state.m[r]));
            state.l[r] += x;
          }
        }
      }
      store_accumulators(shared.p(), 0, warp * kWarpKeys, s, 1.f, lane);
    }
    meet();  // P is there, and nobody reads the maxima any more

    // 7: the sums of P first, while V may still be under way.
    const bool ends = here.ends_unit(), is_last = ends || left == 1;  // of these rows
    if (is_last) {
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const float l = quad_sum(state.l[r]);
        if (lane % 4 == 0) shared.give(r * 8 + (lane >> 2), warp, l);
      }
      meet();  // the sums are there
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const float4 x = shared.take(r * 8 + (lane >> 2));
        state.l[r] = (x.x + x.y) + (x.z + x.w);
      }
    }
    ptx::mbarrier_wait(shared.full(stage, 1), ring.parity);
    gemm<kKeys>(o, p, OperandB<Math, KvTile, Major::kOuterMajor>(shared.v(stage), 0, col, lane));
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(shared.empty(stage, 1));

    // 8
    if (is_last) {
      if constexpr (kCluster > 1) {
        // All of it is merged in the end.
      } else if (begins && ends) {
        store_results<Element>(problem, plan, rows, o, state, col, thread);
      } else if (!begins) {
        leave_piece(problem, plan, part.piece(plan, part.index), o, state, rows.count, col, thread);
      }
    }
    if (--left == 0) break;
    here.advance(problem, plan);
    turns = here.tile == 0;
  }

  if (kCluster == 1 && (!begins || here.ends_unit())) return;
  // 9: nothing is under way into the stages any more.
  store_accumulators(shared.o(), 0, col, o, 1.f, lane);
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r) {
    const uint32_t to = shared.states() + (r * 8 + (lane >> 2)) * 8;
    if (thread < 32 && lane % 4 == 0) ptx::sts_f32x2(to, state.m[r], state.l[r]);
  }
  if constexpr (kCluster > 1) {
    merge_in_cluster(shared, problem, plan, rows, thread);
  } else {
    meet();  // O, m and l are there
    const unsigned last_tile = part.end() + (here.tiles.count - 2 - here.tile);
    merge_pieces(shared, problem, plan, rows, part, part.parts.part_of(last_tile), thread);
  }
}

}  // namespace jax_flash2::sm80
