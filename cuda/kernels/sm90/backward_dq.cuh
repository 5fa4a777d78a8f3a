// The warpgroup of the sm_90a backward that multiplies dQ. Steps as in backward.cuh.
#pragma once

#include "device/dq_accum.cuh"
#include "device/math.cuh"
#include "kernels/sm90/backward_plan.cuh"

namespace jax_flash2::sm90 {

template <BackwardTiles kTiles, typename Math>
struct DqWarp {
  using Smem = BackwardSmem<kTiles>;
  using DqMma = ptx::Wgmma<kTiles.dq_cols, typename Math::Element>;

  const BackwardParams& p;
  const Smem smem;

  // Adds dS K of a step to the sums of dQ; in a fixed order, the first in turn puts it in their place.
  // `release` follows the last product, and `await_turn` precedes the first addition.
  template <typename Release, typename AwaitTurn>
  JF2_DEVICE void add_step(const KeyBlock& block, const StepCursor<kTiles>& now, int slot,
                           int buffer, const Release& release, const AwaitTurn& await_turn) const {
    const int thread = ptx::thread_index(), warp = thread / 32 % 4;
    const bool puts = p.order.fixed && turn_of<kTiles>(block, now.row) == 0;
    const int padded_dim = int(round_up(ptx::opaque(p.shape.head_dim), kHeadDimTile));
    const int64_t row = now.padded_row(p, block.batch);
    float* const sums = dq_lane(p.dq_accum + (row + warp * 16) * padded_dim, thread % 32);
    const uint32_t ds = ptx::opaque(smem.ds(buffer).outer_major());
    const uint32_t k = ptx::opaque(smem.k(slot).outer_major());
    constexpr int kParts = kTiles.block_q / 64 * (kTiles.head_dim / kTiles.dq_cols);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int part_row = part % (kTiles.block_q / 64) * 64;
      const int col = part / (kTiles.block_q / 64) * kTiles.dq_cols;
      float dq[kTiles.dq_cols / 2];
      const uint32_t a = ds + Smem::Scores::outer_major_column(part_row);
      const uint32_t b = k + Smem::KV::outer_major_column(col);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kTiles.block_k(); i += 16)
        DqMma::template ss<true, true>(dq, a + Smem::Scores::outer_major_offset(i),
                                       b + Smem::KV::outer_major_offset(i), i > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
#pragma unroll
      for (float& x : dq) ptx::pin(x);
      if (part + 1 == kParts) release();
      if (part == 0) await_turn();
      float* const to = sums + part_row * padded_dim;
#pragma unroll
      for (int j = 0; j < kTiles.dq_cols / 8; ++j) {
        // H may be far less than the tile's head dim where Hv is not.
        if ((col + j * 8) / kHeadDimTile * kHeadDimTile >= padded_dim) break;
        const float (&c)[4] = *reinterpret_cast<const float (*)[4]>(&dq[j * 4]);
        float* const place = to + (col / 8 + j) * kDqPiece;
        puts ? put_dq(place, c) : add_dq(place, c);
      }
    }
  }
};

template <BackwardTiles kTiles, typename Math>
JF2_DEVICE void multiply_dq(const BackwardParams& p, BackwardSmem<kTiles> smem) {
  const DqWarp<kTiles, Math> work{p, smem};
  RingPlace<KeyBlock::kSlots> record;
  RingPlace<BackwardSmem<kTiles>::kDsBuffers> ds;
  auto arrive = [](uint32_t barrier) __attribute__((always_inline)) {
    __syncwarp();
    if ((ptx::thread_index() & 31) == 0) ptx::mbarrier_arrive(barrier);
  };

#pragma unroll 1
  while (true) {
    ptx::mbarrier_wait(smem.k_full(record.slot()), record.parity());
    const KeyBlock& block = smem.blocks[record.slot()];
    if (!block.live) break;
    StepCursor<kTiles> now(block);
    if (now.left == 0) arrive(smem.k_empty());
#pragma unroll 1
    for (; now.left > 0; now.advance()) {
      ptx::mbarrier_wait(smem.ds_full(ds.slot()), ds.parity());
      work.add_step(
          block, now, record.slot(), ds.slot(),
          [&]() __attribute__((always_inline)) {
            arrive(smem.ds_empty(ds.slot()));
            if (now.left == 1) arrive(smem.k_empty());
          },
          [&]() __attribute__((always_inline)) {
            if (p.order.fixed) ptx::mbarrier_wait(smem.turn(ds.slot()), ds.parity());
          });
      if (p.order.fixed) arrive(smem.added(ds.slot()));
      ds.advance();
    }
    ptx::mbarrier_arrive(smem.block_empty(record.slot()));
    record.advance();
  }
}

}  // namespace jax_flash2::sm90
