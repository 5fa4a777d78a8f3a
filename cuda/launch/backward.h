// The backward's main kernels at one head dim: H and Hv at most kHeadDim, between the preprocess
// and the postprocess. The build instantiates every head dim it holds in a translation unit of its
// own.
#pragma once

#include <cuda_runtime.h>

#include "core/problem.h"
#include "core/status.h"

namespace jax_flash2::gpu {

template <int kHeadDim>
Status launch_backward(const BackwardProblem& problem, cudaStream_t stream);

}  // namespace jax_flash2::gpu
