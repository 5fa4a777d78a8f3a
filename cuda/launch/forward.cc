// The forward on CUDA: the selected kernel, launched.
#include "launch/forward.h"

#include "launch/launch.h"
#include "launch/launch_util.h"
#include "launch/select.h"

namespace jax_flash2::gpu {

Status forward(const ForwardProblem& problem, cudaStream_t stream) {
  if (problem.shape.batch == 0 || problem.shape.query_len == 0) return {};
  int major = 0;
  Selection selection;
  if (Status s = compute_capability_major(major); !s.ok()) return s;
  if (Status s = select(problem, major, selection); !s.ok()) return s;
  return at_head_dim(selection.head_dim, [&](auto head_dim) {
    if constexpr (kHasSm90) {
      if (selection.sm90) return launch_forward_sm90<head_dim>(problem, stream);
    }
    return launch_forward<head_dim>(problem, stream);
  });
}

}  // namespace jax_flash2::gpu
