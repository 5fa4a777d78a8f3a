// The forward of compute capability 9.0 on the emulated machine, from its launcher down, against its
// definition. Run by tests/test_emulated.py.
#include "driver.h"
#include "launch/forward_sm90_instance.cuh"

template <>
jax_flash2::Status jax_flash2::gpu::launch_forward<HEAD_DIM>(const ForwardProblem&, cudaStream_t) {
  return Status::internal("the kernels of every GPU were chosen");
}

// Instantiates what stands above.
#include "launch/forward.cc"
#include "launch/select.cc"

namespace emulated {

template <typename Element>
struct Forward {
  void operator()(int seed, int longest) const {
    Problem<Element> problem(seed, longest, true);
    const Shape& s = problem.shape;
    machine.task = problem.describe();
    std::vector<Element> out[2];
    std::vector<float> lse[2];
    for (int run = 0; run < 2; ++run) {
      out[run] = unwritten<Element>(problem.queries() * s.query_heads * s.value_dim);
      lse[run] = unwritten<float>(problem.queries() * s.query_heads);
      std::vector<int32_t> queue(s.batch, 77);
      begin_schedule(2 * seed + run);
      expect_ok(gpu::forward({.shape = s,
                              .dtype = problem.dtype(),
                              .precision = Precision::kDefault,
                              .family = Family::kAuto,
                              .scale = problem.scale,
                              .band = problem.mask.spec(),
                              .q = problem.q.data(),
                              .k = problem.k.data(),
                              .v = problem.v.data(),
                              .out = out[run].data(),
                              .lse = lse[run].data(),
                              .next_tile = queue.data()},
                             nullptr));
    }
    expect_same("out", out[0], out[1]);
    expect_same("lse", lse[0], lse[1]);
    const Results want = define<Element>(problem, {}, {});
    // Of P, a rounding to the element type, and that of scores to float32.
    const double of_scores = 1e-6 * want.largest_score;
    expect_near("out", out[0], want.out, 2 * Problem<Element>::epsilon() + of_scores);
    for (size_t i = 0; i < want.lse.size(); ++i) {
      const bool same = lse[0][i] == want.lse[i];  // both may be infinite
      if (!same && !(std::fabs(lse[0][i] - want.lse[i]) < 2e-6 + of_scores))
        fail("lse[%zu] is %g, not %g", i, lse[0][i], want.lse[i]);
    }
  }
};

}  // namespace emulated

int main(int count, char** arguments) {
  return emulated::drive<emulated::Forward>(count, arguments);
}
