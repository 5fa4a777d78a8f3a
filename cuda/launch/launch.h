// The entry to the CUDA kernels: a problem in, launches on the stream out. Never allocates, never
// synchronises, so that XLA may capture it in a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include "core/decode.h"
#include "core/problem.h"
#include "core/status.h"

namespace jax_flash2::gpu {

Status forward(const ForwardProblem& problem, cudaStream_t stream);
Status backward(const BackwardProblem& problem, cudaStream_t stream);
Status decode(const DecodeProblem& problem, cudaStream_t stream);

}  // namespace jax_flash2::gpu
