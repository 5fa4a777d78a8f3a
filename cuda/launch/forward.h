// The forward at one head dim: H and Hv at most kHeadDim. The build instantiates every head dim it
// holds in a translation unit of its own.
#pragma once

#include <cuda_runtime.h>

#include "core/problem.h"
#include "core/status.h"

namespace jax_flash2::gpu {

template <int kHeadDim>
Status launch_forward(const ForwardProblem& problem, cudaStream_t stream);

}  // namespace jax_flash2::gpu
