// Launchers of the decoding kernel at one head dim, for every dtype. The build generates a
// translation unit a head dim that includes this file and instantiates launch_decode<head dim>.
#pragma once

#include <algorithm>
#include <numbers>
#include <string>

#include "kernels/sm80/decode.cuh"
#include "launch/decode.h"
#include "launch/launch_util.h"

namespace jax_flash2::gpu {

// The grid and the plan of a call.
template <typename Config>
Status plan_decode(const DecodeProblem& problem, cudaStream_t stream, sm80::DecodePlan& plan,
                   LaunchConfig& launch) {
  using Shared = sm80::DecodeShared<Config>;
  const Shape& shape = problem.shape;
  int multiprocessors = 0, block_limit = 0, multiprocessor_bytes = 0;
  if (Status s = multiprocessor_count(multiprocessors); !s.ok()) return s;
  if (Status s = shared_memory_limit(block_limit); !s.ok()) return s;
  if (Status s = shared_memory_of_multiprocessor(multiprocessor_bytes); !s.ok()) return s;
  // Each block on a multiprocessor takes 1 KB more than it asks for. Two stages are the least: where
  // two blocks have not as many, one.
  const auto stages_in = [](int bytes) {
    return (bytes - Shared::bytes(0)) / sm80::kDecodeStageBytes;
  };
  int blocks = Config::kBlocks;
  if (stages_in(multiprocessor_bytes / blocks - 1024) < 2) blocks = 1;
  const int stages =
      std::min(stages_in(std::min(block_limit, multiprocessor_bytes / blocks - 1024)),
               sm80::kDecodeStages / blocks);

  constexpr int kBatchBytes =
      2 * Config::kBatch * Config::kHeadDim * int(sizeof(typename Config::Element));  // of K and V
  const int64_t rows = problem.rows(), row_blocks = (rows + Config::kRows - 1) / Config::kRows;
  const int64_t units = shape.kv_heads * row_blocks;
  const int64_t most_tiles = shape.batch * units * (int64_t{shape.kv_len} / Config::kKeys + 2);
  if (most_tiles > INT32_MAX) {
    return Status::invalid_argument("jax_flash2: batch * heads * keys makes " +
                                    std::to_string(most_tiles) +
                                    " tiles, of which 2**31 - 1 can be counted: split the batch");
  }
  const int page_size = problem.pages.table != nullptr ? problem.pages.size : kPageMultiple;
  plan = {
      .scale_log2 = static_cast<float>(problem.scale * std::numbers::log2e),
      .stages = stages,
      .number = number_of_launch(),
      .ahead = 4 * kBatchBytes * blocks <= sm80::kDecodeBytesAhead ? 4 : 2,
      .rows = problem.rows(),
      .group = Divisor(shape.group()),
      .row_blocks = Divisor(static_cast<uint32_t>(row_blocks)),
      .parts = Divisor(1),
      .lanes = Divisor(1),
      .units = Divisor(static_cast<uint32_t>(units)),
      .page_groups = Divisor(page_size / kPageMultiple),
  };
  launch = {
      .blocks = shape.batch * units * Config::kCluster,
      .threads = sm80::kDecodeThreads,
      .shared_bytes = Shared::bytes(plan.stages),
      .stream = stream,
      .cluster = Config::kCluster,
  };
  if (Config::kCluster > 1) return {};

  // An H200's 132 multiprocessors hang on eight ports to memory, 16 or 18 on each: with as many
  // blocks on every port, all finish together. Elsewhere it would leave out too many.
  int64_t grid = std::min(int64_t{blocks} * multiprocessors, int64_t{kDecodeBlocks});
  if (grid % 64 * 25 <= grid) grid -= grid % 64;
  // All heads of a sequence side by side read memory in one stream. If that leaves few blocks out.
  const int64_t side_by_side = grid / shape.kv_heads * shape.kv_heads;
  if (side_by_side * 32 >= grid * 31) {
    grid = side_by_side;
    plan.lanes = Divisor(shape.kv_heads);
    plan.units = Divisor(static_cast<uint32_t>(row_blocks));
  }
  launch.blocks = std::min(grid, most_tiles);
  plan.parts = Divisor(static_cast<uint32_t>(launch.blocks / plan.lanes.d));
  return {};
}

template <typename Config>
Status launch_decode_config(const DecodeProblem& problem, cudaStream_t stream) {
  sm80::DecodePlan plan;
  LaunchConfig config;
  if (Status s = plan_decode<Config>(problem, stream, plan, config); !s.ok()) return s;
  return launch<sm80::decode_kernel<Config>>(config, problem, plan);
}

template <typename Math, int kHeadDim>
Status launch_decode_math(const DecodeProblem& problem, cudaStream_t stream) {
  using Few = sm80::DecodeConfig<Math, kHeadDim, false>;
  using Many = sm80::DecodeConfig<Math, kHeadDim, true>;
  if constexpr (Many::kRows > Few::kRows) {
    if (problem.rows() > Few::kRows) return launch_decode_config<Many>(problem, stream);
  }
  return launch_decode_config<Few>(problem, stream);
}

template <int kHeadDim>
Status launch_decode(const DecodeProblem& problem, cudaStream_t stream) {
  switch (problem.dtype) {
    case DType::kFloat16:
      return launch_decode_math<Float16, kHeadDim>(problem, stream);
    case DType::kBFloat16:
      return launch_decode_math<BFloat16, kHeadDim>(problem, stream);
    case DType::kFloat32:  // memory is the limit: accurate products cost no time
      return launch_decode_math<Tf32x3, kHeadDim>(problem, stream);
    case DType::kFloat64:
      break;
  }
  return Status::unimplemented("jax_flash2: no CUDA kernel computes in float64");
}

}  // namespace jax_flash2::gpu
