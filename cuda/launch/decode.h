// Decoding at one head dim: H and Hv at most kHeadDim. The build instantiates every head dim that it
// has for it in a translation unit of its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/decode.h"
#include "core/status.h"

namespace jax_flash2::gpu {

// A number that no other launch has, and that uninitialised memory does not hold, but for a chance
// of 2^-64.
uint64_t number_of_launch();

template <int kHeadDim>
Status launch_decode(const DecodeProblem& problem, cudaStream_t stream);
// In clusters: for a call of which decodes_in_clusters (launch/select.h) is true.
template <int kHeadDim>
Status launch_decode_sm90(const DecodeProblem& problem, cudaStream_t stream);

}  // namespace jax_flash2::gpu
