// Chooses the forward kernel: the family of the device, then the smallest head dim of this build
// that holds H and Hv.
#include "launch/forward.h"

#include <algorithm>
#include <string>

#include "jax_flash2_config.h"
#include "launch/launch.h"
#include "launch/launch_util.h"

namespace jax_flash2::gpu {
namespace {

constexpr int kHeadDimCount = static_cast<int>(std::size(kHeadDims));

// Whether the sm_90a kernels take this problem; the sm_80 class takes everything else.
Status takes_sm90(const ForwardProblem& problem, bool& takes) {
  takes = false;
  if (!kHasSm90 || problem.family == Family::kSm80 || problem.next_tile == nullptr) return {};
  if (problem.dtype != DType::kFloat16 && problem.dtype != DType::kBFloat16) return {};
  if (problem.shape.kv_len == 0) return {};  // no tensor map has an empty side
  if (!(problem.scale > 0)) return {};       // the largest score has the largest exponent
  int major = 0;
  if (Status s = compute_capability_major(major); !s.ok()) return s;
  takes = major == 9;
  return {};
}

template <int kIndex>
Status forward_at(const ForwardProblem& problem, cudaStream_t stream, int head_dim, bool sm90) {
  if constexpr (kIndex == kHeadDimCount) {
    return Status::unimplemented("jax_flash2: head dim " + std::to_string(head_dim) +
                                 " is beyond this build's largest, " +
                                 std::to_string(kHeadDims[kHeadDimCount - 1]));
  } else {
    constexpr int kHeadDim = kHeadDims[kIndex];
    if (head_dim > kHeadDim) return forward_at<kIndex + 1>(problem, stream, head_dim, sm90);
    if constexpr (kHasSm90) {
      if (sm90) return launch_forward_sm90<kHeadDim>(problem, stream);
    }
    return launch_forward<kHeadDim>(problem, stream);
  }
}

}  // namespace

Status forward(const ForwardProblem& problem, cudaStream_t stream) {
  const Shape& shape = problem.shape;
  if (shape.batch == 0 || shape.query_len == 0) return {};
  bool sm90 = false;
  if (Status s = takes_sm90(problem, sm90); !s.ok()) return s;
  return forward_at<0>(problem, stream, std::max(shape.head_dim, shape.value_dim), sm90);
}

}  // namespace jax_flash2::gpu
