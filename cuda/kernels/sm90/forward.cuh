// The sm_90a forward for float16 and bfloat16: FlashAttention-2's algorithm (cuda/README.md, "The
// forward" and "On Hopper") with warp-specialised roles.
//
//   1 A persistent block takes query tiles (block_q rows of one head) from a queue until it is
//     empty.
//   2 The scheduler warp asks for a tile as soon as there is room for its Q, works out its record,
//     and loads Q. The loader warp streams the K and V tiles that the band shows, right to left,
//     through rings of stages: K(j) before V(j + 1).
//   3 Each consumer warpgroup owns 64 rows. One step of its flat loop over (tile, key block):
//     a  S = Q K(j)^T and O += P V, of the step before, go to the tensor cores together;
//     b  S arrives: K's stage is free; hide what the band hides;
//     c  P = 2^(scale S - m), the first half while the second product still runs;
//     d  O arrives: V's stage is free. If the step opened a new tile, the old one is finished here:
//        O / l through shared memory to global, log-sum-exp beside it. Where shared memory has no
//        room for a second Q and O, a tile ends with its last product, and O leaves from registers.
//     Blocks at a tile's right end that no row of a warpgroup sees, it passes over.
//   4 Where the tile's row says so, a warpgroup issues its products in turn (ping-pong), so that
//     one's softmax runs under the other's products.
//   5 The row maximum is looked for in a tile's first block and in blocks that the band cuts; in
//     between the stale one serves, and no time goes into maxima. If P grows too large under it
//     (kStaleLimit), the tile fails, and is done again from the start, looking in every block. What
//     comes out thus depends on the tile alone, not on what a block has seen before.
#pragma once

#include "kernels/sm90/forward_consumer.cuh"
#include "kernels/sm90/forward_producer.cuh"

namespace jax_flash2::sm90 {

// (Its argument is the head dim, not the row: nvcc 13.0 cannot name a struct-valued argument of a
// __global__ template in host code.)
template <int kHeadDim, typename Math>
__global__ void __launch_bounds__(forward_tiles(kHeadDim).threads(), 1)
    forward_kernel(const __grid_constant__ CUtensorMap q_map,
                   const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ CUtensorMap v_map,
                   const __grid_constant__ CUtensorMap out_map,
                   const __grid_constant__ ForwardParams p) {
  constexpr ForwardTiles kTiles = forward_tiles(kHeadDim);
  extern __shared__ uint8_t shared[];
  const uint32_t unaligned = ptx::shared_address(shared), base = (unaligned + 1023) & ~1023u;
  using Smem = ForwardSmem<kTiles>;
  const Smem smem{base,
                  reinterpret_cast<ForwardTile*>(shared + (base - unaligned) + Smem::kTileRecords)};
  const int thread = threadIdx.x, warp = ptx::uniform(thread / 32), lane = thread % 32;
  if (thread == 0) {
    for (int i = 0; i < kTiles.q_buffers; ++i) {
      ptx::mbarrier_init(smem.q_full(i), 1);
      ptx::mbarrier_init(smem.q_empty(i), Smem::kThreads);
    }
    for (int i = 0; i < kTiles.stages; ++i) {
      ptx::mbarrier_init(smem.k_full(i), 1);
      ptx::mbarrier_init(smem.k_empty(i), Smem::kWarps);
      if constexpr (kTiles.joint) continue;
      ptx::mbarrier_init(smem.v_full(i), 1);
      ptx::mbarrier_init(smem.v_empty(i), Smem::kWarps);
    }
    for (int i = 0; i < ForwardTile::kSlots; ++i) {
      ptx::mbarrier_init(smem.scheduled(i), 1);
      smem.tiles[i].fails = false;
    }
    ptx::mbarrier_init(smem.v_landed(), 1);
    ptx::mbarrier_init(smem.drained(), Smem::kThreads);
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensor_map(&q_map);
    ptx::prefetch_tensor_map(&k_map);
    ptx::prefetch_tensor_map(&v_map);
    ptx::prefetch_tensor_map(&out_map);
  }
  __syncthreads();  // the barriers stand before anyone waits on them
  if (warp < 4) {
    ptx::setmaxnreg_dec<kTiles.producer_registers>();
    if (warp == 0) schedule<kTiles>(p, smem, &q_map, lane);
    if (warp == 1) load<kTiles>(smem, &k_map, &v_map, lane);
  } else {
    ptx::setmaxnreg_inc<kTiles.consumer_registers>();
    consume<kTiles, Math>(p, smem, &out_map);
  }
}

}  // namespace jax_flash2::sm90
