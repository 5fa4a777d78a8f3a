// The backward on CUDA: preprocess, the selected main kernel(s), the sum of dK and dV, postprocess.
#include <cstddef>

#include "kernels/any/postprocess.cuh"
#include "kernels/any/preprocess.cuh"
#include "kernels/any/sum_dkv.cuh"
#include "launch/backward.h"
#include "launch/launch.h"
#include "launch/launch_util.h"
#include "launch/select.h"

namespace jax_flash2::gpu {
namespace {

Status zero(void* data, int64_t rows, int heads, int dim, size_t element, cudaStream_t stream) {
  const size_t bytes = static_cast<size_t>(rows) * heads * dim * element;
  if (bytes == 0) return {};
  return cuda_status(cudaMemsetAsync(data, 0, bytes, stream), "zeroing a gradient");
}

Status zero_gradients(const BackwardProblem& problem, size_t element, cudaStream_t stream) {
  const Shape& shape = problem.shape;
  const int64_t rows = shape.batch * shape.query_len, keys = shape.batch * shape.kv_len;
  if (Status s = zero(problem.dq, rows, shape.query_heads, shape.head_dim, element, stream);
      !s.ok()) {
    return s;
  }
  if (Status s = zero(problem.dk, keys, shape.kv_heads, shape.head_dim, element, stream); !s.ok()) {
    return s;
  }
  return zero(problem.dv, keys, shape.kv_heads, shape.value_dim, element, stream);
}

template <typename Element>
Status run(BackwardProblem problem, const Selection& selection, cudaStream_t stream) {
  const Shape& shape = problem.shape;
  // Where nobody sees anything there is nothing to launch.
  if (shape.query_len == 0 || shape.kv_len == 0 || problem.band.lower > problem.band.upper) {
    return zero_gradients(problem, sizeof(Element), stream);
  }
  if (selection.mode == BackwardMode::kSplit) problem.dq_accum = nullptr;
  if (selection.mode != BackwardMode::kDeterministic) problem.semaphores = nullptr;
  // Where Hopper sums dQ in a fixed order, what comes first takes the place of zeros.
  BackwardProblem zeroed = problem;
  if (selection.sm90 && problem.semaphores != nullptr) zeroed.dq_accum = nullptr;
  const int64_t tiles =
      shape.batch * shape.query_heads * (round_up(shape.query_len, kTokenTile) / kTokenTile);
  const LaunchConfig preprocess = {.blocks = tiles * (kTokenTile / kPreprocessRows),
                                   .threads = kPreprocessThreads,
                                   .shared_bytes = 0,
                                   .stream = stream};
  if (Status s = selection.sm90 ? launch<preprocess_kernel<Element, true>>(preprocess, zeroed)
                                : launch<preprocess_kernel<Element, false>>(preprocess, zeroed);
      !s.ok()) {
    return s;
  }
  Status main = at_head_dim(selection.head_dim, [&](auto head_dim) {
    if constexpr (kHasSm90) {
      if (selection.sm90) return launch_backward_sm90<head_dim>(problem, stream);
    }
    return launch_backward<head_dim>(problem, stream);
  });
  if (!main.ok()) return main;
  if (problem.dkv_partial != nullptr) {
    const int64_t rows = int64_t{shape.kv_len} * shape.kv_heads;
    if (Status s = launch<sum_dkv_kernel<Element>>(
            {.blocks = shape.batch * (round_up(rows, kSumRows) / kSumRows),
             .threads = kSumThreads,
             .shared_bytes = 0,
             .stream = stream},
            problem);
        !s.ok()) {
      return s;
    }
  }
  if (problem.dq_accum == nullptr) return {};
  return launch<postprocess_kernel<Element>>(
      {.blocks = tiles * (kTokenTile / (kPostprocessWarps * 16)),
       .threads = kPostprocessWarps * 32,
       .shared_bytes = 0,
       .stream = stream},
      problem, static_cast<float>(problem.scale));
}

}  // namespace

Status backward(const BackwardProblem& problem, cudaStream_t stream) {
  int major = 0;
  Selection selection;
  if (Status s = compute_capability_major(major); !s.ok()) return s;
  if (Status s = select(problem, major, selection); !s.ok()) return s;
  switch (problem.dtype) {
    case DType::kFloat16:
      return run<__half>(problem, selection, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(problem, selection, stream);
    case DType::kFloat32:
      return run<float>(problem, selection, stream);
    case DType::kFloat64:
      break;
  }
  return Status::unimplemented("jax_flash2: no CUDA kernel computes in float64");
}

}  // namespace jax_flash2::gpu
