// Decoding in clusters: little work, which waits for latencies, not for memory. The blocks of a
// cluster share a unit's keys, and each merges its share of the unit's results, out of the shared
// memory of all: sooner by far than through global memory, where one would have to wait for
// the others' stores and read them all. Compiled for sm_90a alone.
#pragma once

#include "device/ptx_sm90.cuh"
#include "kernels/sm80/decode.cuh"

namespace jax_flash2::sm80 {

// Eight lanes, one a block, have four columns of a row. O, m and l are in every block's shared
// memory.
template <typename Config>
JF2_DEVICE void merge_in_cluster(const DecodeShared<Config>& shared, const DecodeProblem& problem,
                                 const DecodePlan& plan, const DecodeRows& rows, int thread) {
  using Element = typename Config::Element;
  constexpr int kCluster = Config::kCluster, kQuads = Config::kHeadDim / 4;
  constexpr int kAtOnce = 32 / kCluster;  // of a warp
  static_assert(kQuads % kAtOnce == 0, "a warp is in one row");
  const int warp = thread / 32, lane = thread % 32, block = lane % kCluster;
  const int value_dim = problem.shape.value_dim;
  ptx::cluster_sync();
  for (int first = (ptx::cluster_rank() * kDecodeWarps + warp) * kAtOnce;
       first < rows.count * kQuads; first += kCluster * kDecodeWarps * kAtOnce) {
    const int i = first / kQuads, c = (first % kQuads + lane / kCluster) * 4;
    const float2 state =
        ptx::ld_cluster_f32x2(ptx::shared_of_block(shared.states() + i * 8, block));
    float4 o = ptx::ld_cluster_f32x4(ptx::shared_of_block(shared.o().address(i, c), block));
    float m = state.x;
#pragma unroll
    for (int d = 1; d < kCluster; d *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, d));
    const float weight = ptx::ex2(state.x - m);
    float l = state.y * weight;
    o = make_float4(o.x * weight, o.y * weight, o.z * weight, o.w * weight);
#pragma unroll
    for (int d = 1; d < kCluster; d *= 2) {
      l += __shfl_xor_sync(~0u, l, d);
      o.x += __shfl_xor_sync(~0u, o.x, d);
      o.y += __shfl_xor_sync(~0u, o.y, d);
      o.z += __shfl_xor_sync(~0u, o.z, d);
      o.w += __shfl_xor_sync(~0u, o.w, d);
    }
    if (block != 0) continue;
    if (c == 0) store_lse(problem, plan, rows, i, m, l);
    if (c < value_dim) {
      const float inverse = inverse_of(l);
      store_quad(
          static_cast<Element*>(problem.out) + rows.index(problem.shape, plan, i) * value_dim + c,
          make_float4(o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse));
    }
  }
  ptx::cluster_sync_relaxed();  // nobody's shared memory is read any more
}

}  // namespace jax_flash2::sm80
