// The float32 sums of dQ between the main kernel and the postprocess, in the order in which the
// accumulators of mma.sync and wgmma hold them, so that a warp adds 16 x 8 pieces of 512
// contiguous bytes.
//
// dq_accum is [B, N, Tp, Hp]. 16 query rows are Hp / 8 pieces, one after the other; which of a
// piece's 128 floats belongs to which lane is known to this file alone.
#pragma once

#include "device/ptx_sm80.cuh"

namespace jax_flash2 {

inline constexpr int kDqPiece = 128;  // floats

#if __CUDA_ARCH__ >= 900

// A lane's place in a piece: four floats from here on.
JF2_DEVICE float* dq_lane(float* piece, int lane) { return piece + lane * 4; }
JF2_DEVICE void add_dq(float* place, const float (&c)[4]) {
  ptx::red_add_f32x4(place, make_float4(c[0], c[1], c[2], c[3]));
}
JF2_DEVICE void put_dq(float* place, const float (&c)[4]) {
  *reinterpret_cast<float4*>(place) = make_float4(c[0], c[1], c[2], c[3]);
}
JF2_DEVICE void read_dq(const float* place, float (&c)[4]) {
  const float4 x = *reinterpret_cast<const float4*>(place);
  c[0] = x.x, c[1] = x.y, c[2] = x.z, c[3] = x.w;
}

#else

// A lane's place in a piece: four floats, 32 apart, since these architectures add one at a time.
JF2_DEVICE float* dq_lane(float* piece, int lane) { return piece + lane; }
JF2_DEVICE void add_dq(float* place, const float (&c)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) ptx::red_add_f32(place + e * 32, c[e]);
}
JF2_DEVICE void put_dq(float* place, const float (&c)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) place[e * 32] = c[e];
}
JF2_DEVICE void read_dq(const float* place, float (&c)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) c[e] = place[e * 32];
}

#endif

}  // namespace jax_flash2
