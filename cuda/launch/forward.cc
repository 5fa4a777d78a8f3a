// Chooses the forward kernel: the smallest head dim of this build that holds H and Hv.
#include "launch/forward.h"

#include <algorithm>
#include <string>

#include "jax_flash2_config.h"
#include "launch/launch.h"

namespace jax_flash2::gpu {
namespace {

constexpr int kHeadDimCount = static_cast<int>(std::size(kHeadDims));

template <int kIndex>
Status forward_at(const ForwardProblem& problem, cudaStream_t stream, int head_dim) {
  if constexpr (kIndex == kHeadDimCount) {
    return Status::unimplemented("jax_flash2: head dim " + std::to_string(head_dim) +
                                 " is beyond this build's largest, " +
                                 std::to_string(kHeadDims[kHeadDimCount - 1]));
  } else {
    if (head_dim <= kHeadDims[kIndex]) return launch_forward<kHeadDims[kIndex]>(problem, stream);
    return forward_at<kIndex + 1>(problem, stream, head_dim);
  }
}

}  // namespace

Status forward(const ForwardProblem& problem, cudaStream_t stream) {
  const Shape& shape = problem.shape;
  if (shape.batch == 0 || shape.query_len == 0) return {};
  return forward_at<0>(problem, stream, std::max(shape.head_dim, shape.value_dim));
}

}  // namespace jax_flash2::gpu
