// The sm_90a backward for float16 and bfloat16: FlashAttention-2's algorithm (cuda/README.md, "The
// backward" and "On Hopper") with warp-specialised roles.
//
//   1 A persistent thread block takes key blocks (block_k keys of one K/V head, with the query heads of
//     its group or a part of them) from a queue until it is empty.
//   2 The loader, a warp, loads K and V of the block, and Q, dO, LSE and D of one step after the other:
//     a step is a query tile that sees the keys, first rows first, for one head after the other.
//   3 Two warpgroups own 64 keys each (backward_keys.cuh). Their scores are transposed, a row a key, so
//     that P^T and dS^T are operands as they stand, and only dS leaves the registers, for dQ:
//     a  S^T = K Q^T - LSE / scale, the last term by a product with ones. P = exp(scale S); hide what
//        the band hides.
//     b  dP^T = V dO^T - D in the same way; dV += P^T dO.
//     c  dP arrives: dS = P dP, into one of two buffers in shared memory.
//     d  S of the next step, and dK += dS^T Q. S arrives, and its exponentials run under dK.
//     Where dK and dV of 64 keys are too much for one, they share the keys (backward_matrices.cuh): one
//     does a and dV, the other b, c and dK.
//   4 A warpgroup of its own multiplies dQ = dS K and adds it to float32 sums in global memory, in a fixed
//     order if asked to (backward_turns.cuh). Additions wait where memory is busy; the loader, a warpgroup
//     apart, does not wait with them. Where dQ has a kernel of its own (split_dq.cuh), there is no such
//     warpgroup, and dS stays in registers.
//   5 At the end dV and dK leave through a tile of their own, or those of dS or P, while the next block's
//     K and V arrive.
#pragma once

#include "kernels/sm90/backward_dq.cuh"
#include "kernels/sm90/backward_keys.cuh"
#include "kernels/sm90/backward_loader.cuh"
#include "kernels/sm90/backward_matrices.cuh"
#include "kernels/sm90/backward_turns.cuh"

namespace jax_flash2::sm90 {

template <int kHeadDim, typename Math, bool kHasDq>
__global__ void __launch_bounds__(backward_threads(kHasDq), 1)
    backward_kernel(const __grid_constant__ CUtensorMap q_map,
                    const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map,
                    const __grid_constant__ CUtensorMap dout_map,
                    const __grid_constant__ BackwardParams p) {
  constexpr BackwardTiles kTiles = backward_tiles(kHeadDim);
  static_assert(!kHasDq || kTiles.fuses_dq());
  using Smem = BackwardSmem<kTiles>;
  extern __shared__ uint8_t shared[];
  const uint32_t unaligned = ptx::shared_address(shared), base = (unaligned + 1023) & ~1023u;
  const Smem smem{base,
                  reinterpret_cast<KeyBlock*>(shared + (base - unaligned) + Smem::kBlockRecords)};
  const int thread = threadIdx.x, warpgroup = ptx::uniform(thread / 128);
  if (thread == 0) {
    constexpr int kWarps = 8, kWarpgroup = 4;  // of the consumers, of each warpgroup
    const int turns = kHasDq && p.order.fixed ? 2 : 0;
    constexpr int kKeyWarps = Smem::kSharesMatrices ? kWarpgroup : kWarps;  // that read K, or V
    for (int i = 0; i < KeyBlock::kSlots; ++i) {
      ptx::mbarrier_init(smem.k_full(i), 1);
      ptx::mbarrier_init(smem.v_full(i), 1);
      // Each thread that reads the record tells itself, not a warp for its lanes: in a block without
      // steps nothing else keeps them together.
      ptx::mbarrier_init(smem.block_empty(i), (kWarps + (kHasDq ? kWarpgroup : 0) + turns) * 32);
    }
    ptx::mbarrier_init(smem.k_empty(), kHasDq ? kWarpgroup : kKeyWarps);  // dQ reads K last
    ptx::mbarrier_init(smem.v_empty(), kKeyWarps);
    for (int i = 0; i < kTiles.stages; ++i) {
      ptx::mbarrier_init(smem.step_full(i), 1);
      ptx::mbarrier_init(smem.step_empty(i), kWarps);
    }
    for (int i = 0; i < Smem::kDsBuffers; ++i) {
      ptx::mbarrier_init(smem.ds_full(i), kWarps);
      ptx::mbarrier_init(smem.ds_empty(i), kWarpgroup);
      ptx::mbarrier_init(smem.turn(i), 2);
      ptx::mbarrier_init(smem.added(i), kWarpgroup);
    }
    ptx::mbarrier_init(smem.p_full(), kWarpgroup);
    ptx::mbarrier_init(smem.p_empty(), kWarpgroup);
    ptx::fence_mbarrier_init();
  }
  // Rows of terms beyond the three that are ever written.
  for (int i = thread * 8; i < 2 * kTiles.stages * Smem::Terms::kBytes;
       i += backward_threads(kHasDq) * 8)
    ptx::sts_f32x2(base + Smem::kLse + i, 0.f, 0.f);
  ptx::fence_proxy_async();
  __syncthreads();  // barriers and terms stand
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<kTiles.loader_registers>();
    const int warp = ptx::uniform(thread / 32);
    if (warp == 0) BackwardLoader<kTiles>{p, smem, &q_map, &k_map, &v_map, &dout_map}.run();
    if constexpr (kHasDq) {
      if (p.order.fixed && warp == 1) Turns<kTiles>{p, smem}.await();
      if (p.order.fixed && warp == 2) Turns<kTiles>{p, smem}.tell();
    }
  } else if (kHasDq && warpgroup == 3) {
    if constexpr (kHasDq) {
      ptx::setmaxnreg_dec<kTiles.dq_registers>();
      multiply_dq<kTiles, Math>(p, smem);
    }
  } else {
    ptx::setmaxnreg_inc<kTiles.consumer_registers>();
    if constexpr (!Smem::kSharesMatrices) {
      consume_keys<kTiles, Math, kHasDq>(p, smem);
    } else if (warpgroup == 1) {
      consume_matrices<kTiles, Math, true>(p, smem);
    } else {
      consume_matrices<kTiles, Math, false>(p, smem);
    }
  }
}

}  // namespace jax_flash2::sm90
