// Launchers of the forward at one head dim, for every Math. The build generates a translation unit
// a head dim that includes this file and instantiates launch_forward<head dim>.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <numbers>

#include "kernels/sm80/forward.cuh"
#include "launch/forward.h"
#include "launch/launch_util.h"

namespace jax_flash2::gpu {

inline sm80::ForwardPlan plan_forward(const ForwardProblem& problem, const sm80::ForwardTile& tile,
                                      int element_bytes) {
  const Shape& shape = problem.shape;
  sm80::ForwardPlan plan = {};
  plan.query_blocks = static_cast<int>(round_up(shape.query_len, tile.block_q) / tile.block_q);
  // Where later rows see more keys, the longest rows go first, over as many heads at once as keep
  // their keys and values in L2. Where all rows see the same, a head's rows go one after the other.
  plan.section = 1;
  if (problem.band.upper < kUnbounded) {
    constexpr double kL2Bytes = 16e6;
    const double head_bytes = double(element_bytes) * std::max(shape.kv_len, 1) *
                              (shape.head_dim + shape.value_dim) / shape.group();
    const double heads = double(shape.batch) * shape.query_heads;
    plan.section = static_cast<int>(std::clamp(kL2Bytes / head_bytes, 1.0, heads));
  }
  plan.scale_log2 = static_cast<float>(problem.scale * std::numbers::log2e);
  return plan;
}

template <typename Config>
Status launch_forward_config(const ForwardProblem& problem, cudaStream_t stream) {
  constexpr sm80::ForwardTile kTile = Config::kTile;
  const Shape& shape = problem.shape;
  if (shape.batch == 0 || shape.query_len == 0) return {};
  const sm80::ForwardPlan plan =
      plan_forward(problem, kTile, static_cast<int>(sizeof(typename Config::Math::Element)));
  return launch<sm80::forward_kernel<Config>>(
      {.blocks = shape.batch * shape.query_heads * plan.query_blocks,
       .threads = kTile.warps * 32,
       .shared_bytes = sm80::ForwardShared<Config>::kBytes,
       .stream = stream},
      problem, plan);
}

template <int kHeadDim>
Status launch_forward(const ForwardProblem& problem, cudaStream_t stream) {
  using sm80::ForwardConfig;
  switch (problem.dtype) {
    case DType::kFloat16:
      return launch_forward_config<ForwardConfig<Float16, kHeadDim>>(problem, stream);
    case DType::kBFloat16:
      return launch_forward_config<ForwardConfig<BFloat16, kHeadDim>>(problem, stream);
    case DType::kFloat32:
      if (problem.precision == Precision::kDefault) {
        return launch_forward_config<ForwardConfig<Tf32, kHeadDim>>(problem, stream);
      }
      return launch_forward_config<ForwardConfig<Tf32x3, kHeadDim>>(problem, stream);
    case DType::kFloat64:
      break;
  }
  return Status::unimplemented("jax_flash2: no CUDA kernel computes in float64");
}

}  // namespace jax_flash2::gpu
