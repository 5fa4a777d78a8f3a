// Launchers of the backward's main kernels at one head dim, for every Math. The build generates a
// translation unit a head dim that includes this file and instantiates launch_backward<head dim>.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>
#include <numbers>

#include "kernels/sm80/backward.cuh"
#include "kernels/sm80/backward_dq.cuh"
#include "launch/backward.h"
#include "launch/launch_util.h"

namespace jax_flash2::gpu {

// `heads` of all sequences share the grid, in blocks of `block` out of `length` rows or keys.
inline sm80::BackwardPlan plan_backward(const BackwardProblem& problem, int length, int block,
                                        int64_t heads) {
  const Shape& shape = problem.shape;
  sm80::BackwardPlan plan = {};
  plan.blocks = static_cast<int>(round_up(length, block) / block);
  // Where the mask is causal some blocks have more to do than others: they go first, over as many
  // heads at once as keep their queries in L2. Else a head's blocks go one after the other.
  plan.section = 1;
  if (problem.band.upper < kUnbounded) {
    constexpr double kL2Bytes = 16e6;
    const double head_bytes = double(shape.batch) * shape.query_heads * shape.query_len *
                              (4.0 * shape.head_dim + 2.0 * (shape.head_dim + shape.value_dim)) /
                              double(heads);
    plan.section =
        static_cast<int>(std::clamp(kL2Bytes / std::max(head_bytes, 1.0), 1.0, double(heads)));
  }
  plan.scale = static_cast<float>(problem.scale);
  plan.scale_log2 = static_cast<float>(problem.scale * std::numbers::log2e);
  return plan;
}

template <typename Config>
Status launch_backward_main(const BackwardProblem& problem, cudaStream_t stream) {
  const int64_t heads =
      problem.shape.batch * problem.shape.kv_heads * problem.group_splits;  // parts of groups
  const sm80::BackwardPlan plan =
      plan_backward(problem, problem.shape.kv_len, Config::kTile.block_k, heads);
  return launch<sm80::backward_kernel<Config>>(
      {.blocks = heads * plan.blocks,
       .threads = Config::kTile.warps * 32,
       .shared_bytes = sm80::BackwardShared<Config>::kBytes,
       .stream = stream},
      problem, plan);
}

template <typename Config>
Status launch_backward_dq(const BackwardProblem& problem, cudaStream_t stream) {
  const int64_t heads = problem.shape.batch * problem.shape.query_heads;
  const sm80::BackwardPlan plan =
      plan_backward(problem, problem.shape.query_len, Config::kTile.block_q, heads);
  return launch<sm80::backward_dq_kernel<Config>>({.blocks = heads * plan.blocks,
                                                   .threads = Config::kTile.warps * 32,
                                                   .shared_bytes = sm80::DqShared<Config>::kBytes,
                                                   .stream = stream},
                                                  problem, plan);
}

// The main kernel in the first of its tiles that the device has the shared memory for; classes of
// shared memory that lead to the same tile share a kernel.
template <typename Math, int kHeadDim, int kClass = 0>
Status launch_backward_first(const BackwardProblem& problem, cudaStream_t stream, int limit) {
  constexpr int kSmallest = int(std::size(sm80::kSharedClasses)) - 1;
  using Config = sm80::BackwardConfig<Math, kHeadDim, kClass>;
  constexpr int kBytes = sm80::BackwardShared<Config>::kBytes;
  if constexpr (kBytes > sm80::kSharedClasses[kSmallest]) {
    if (limit < kBytes) {
      constexpr int kNext = kBytes > sm80::kSharedClasses[kClass + 1] ? kClass + 1 : kSmallest;
      return launch_backward_first<Math, kHeadDim, kNext>(problem, stream, limit);
    }
  }
  return launch_backward_main<Config>(problem, stream);
}

template <typename Math, int kHeadDim>
Status launch_backward_math(const BackwardProblem& problem, cudaStream_t stream) {
  int limit = 0;
  if (Status s = shared_memory_limit(limit); !s.ok()) return s;
  if (Status s = launch_backward_first<Math, kHeadDim>(problem, stream, limit); !s.ok()) return s;
  if (problem.mode != BackwardMode::kSplit) return {};
  return launch_backward_dq<sm80::DqConfig<Math, kHeadDim>>(problem, stream);
}

template <int kHeadDim>
Status launch_backward(const BackwardProblem& problem, cudaStream_t stream) {
  switch (problem.dtype) {
    case DType::kFloat16:
      return launch_backward_math<Float16, kHeadDim>(problem, stream);
    case DType::kBFloat16:
      return launch_backward_math<BFloat16, kHeadDim>(problem, stream);
    case DType::kFloat32:
      if (problem.precision == Precision::kDefault) {
        return launch_backward_math<Tf32, kHeadDim>(problem, stream);
      }
      return launch_backward_math<Tf32x3, kHeadDim>(problem, stream);
    case DType::kFloat64:
      break;
  }
  return Status::unimplemented("jax_flash2: no CUDA kernel computes in float64");
}

}  // namespace jax_flash2::gpu
