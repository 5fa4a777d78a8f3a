// The backward's main kernels at one head dim: H and Hv at most kHeadDim, between the preprocess
// and the postprocess. The build instantiates every head dim it holds in a translation unit of its
// own.
#pragma once

#include <cuda_runtime.h>

#include "core/problem.h"
#include "core/status.h"

namespace jax_flash2::gpu {

// The sm_80 class: every GPU since Ampere.
template <int kHeadDim>
Status launch_backward(const BackwardProblem& problem, cudaStream_t stream);

// Hopper: float16 and bfloat16, with the queues. Without dq_accum, dQ in a kernel of its own.
template <int kHeadDim>
Status launch_backward_sm90(const BackwardProblem& problem, cudaStream_t stream);

}  // namespace jax_flash2::gpu
