// The backward of compute capability 9.0 on the emulated machine, from its launcher down (preprocess,
// main kernels fused and split, the sum of shares, postprocess), against its definition. Run by
// tests/test_emulated.py.
#include "driver.h"
#include "launch/backward_sm90_instance.cuh"

template <>
jax_flash2::Status jax_flash2::gpu::launch_backward<HEAD_DIM>(const BackwardProblem&,
                                                              cudaStream_t) {
  return Status::internal("the kernels of every GPU were chosen");
}

// Instantiates what stands above.
#include "launch/backward.cu"
#include "launch/select.cc"

namespace emulated {

template <typename Element>
struct Gradients {
  std::vector<Element> dq, dk, dv;
};

template <typename Element>
struct Backward {
  void operator()(int seed, int longest) const {
    Problem<Element> problem(seed, longest, false);
    const Shape& s = problem.shape;
    const int64_t rows = problem.queries() * s.query_heads;
    std::vector<Element> dout = problem.draw.template tensor<Element>(rows * s.value_dim);
    problem.poison_rows(dout, s.query_heads * s.value_dim, problem.hidden_queries());
    const std::vector<float> dlse = problem.draw.template tensor<float>(rows);
    constexpr BackwardMode kModes[] = {BackwardMode::kFused, BackwardMode::kSplit,
                                       BackwardMode::kFused, BackwardMode::kDeterministic};
    const BackwardMode mode = kModes[seed / 2 % 4];
    const int parts = problem.draw.one_in(3) ? s.group() : 1;
    machine.task = problem.describe() + " mode " + std::to_string(int(mode)) + " parts " +
                   std::to_string(parts);

    const Results want = define(problem, dout, dlse);
    std::vector<Element> out(want.out.size());
    for (size_t i = 0; i < out.size(); ++i) out[i] = Element(float(want.out[i]));
    const std::vector<float> lse(want.lse.begin(), want.lse.end());
    Gradients<Element> got[2];
    for (int run = 0; run < 2; ++run) {
      begin_schedule(2 * seed + run);
      got[run] = differentiate(problem, dout, dlse, out, lse, mode, parts);
    }
    expect_same("dk", got[0].dk, got[1].dk);
    expect_same("dv", got[0].dv, got[1].dv);
    // Fused, it is a sum in any order.
    if (mode != BackwardMode::kFused) expect_same("dq", got[0].dq, got[1].dq);
    const double tolerance = 3 * Problem<Element>::epsilon();
    for (const Gradients<Element>& gradients : got) {
      expect_near("dq", gradients.dq, want.dq, tolerance);
      expect_near("dk", gradients.dk, want.dk, tolerance);
      expect_near("dv", gradients.dv, want.dv, tolerance);
    }
  }

  static Gradients<Element> differentiate(const Problem<Element>& problem,
                                          const std::vector<Element>& dout,
                                          const std::vector<float>& dlse,
                                          const std::vector<Element>& out,
                                          const std::vector<float>& lse, BackwardMode mode,
                                          int parts) {
    const Shape& s = problem.shape;
    const int64_t heads = s.batch * s.query_heads, padded = round_up(s.query_len, kTokenTile);
    const int64_t columns = round_up(s.head_dim, kHeadDimTile), both = s.head_dim + s.value_dim;
    Gradients<Element> got = {unwritten<Element>(problem.q.size()),
                              unwritten<Element>(problem.k.size()),
                              unwritten<Element>(problem.v.size())};
    auto row_stats = unwritten<float>(heads * kRowStats * padded);
    auto dq_accum = unwritten<float>(heads * padded * columns);
    auto semaphores = unwritten<int32_t>(heads * padded / kSemaphoreRows);
    auto dkv_partial =
        unwritten<float>(parts == 1 ? 0 : problem.keys() * s.kv_heads * both * parts);
    std::vector<int32_t> queues(s.batch * kQueues, 77);
    const BackwardProblem backward = {
        .shape = s,
        .dtype = problem.dtype(),
        .precision = Precision::kDefault,
        .mode = mode,
        .family = Family::kAuto,
        .scale = problem.scale,
        .band = problem.mask.spec(),
        .q = problem.q.data(),
        .k = problem.k.data(),
        .v = problem.v.data(),
        .out = out.data(),
        .lse = lse.data(),
        .dout = dout.data(),
        .dlse = dlse.data(),
        .dq = got.dq.data(),
        .dk = got.dk.data(),
        .dv = got.dv.data(),
        .row_stats = row_stats.data(),
        .dq_accum = mode == BackwardMode::kSplit ? nullptr : dq_accum.data(),
        .semaphores = mode == BackwardMode::kSplit ? nullptr : semaphores.data(),
        .dkv_partial = parts == 1 ? nullptr : dkv_partial.data(),
        .group_splits = parts,
        .queues = queues.data()};
    gpu::Selection selection;
    expect_ok(gpu::select(backward, 9, selection));
    if (selection.mode == BackwardMode::kDeterministic) selection.mode = mode;  // however few keys
    expect_ok(gpu::run<Element>(backward, selection, nullptr));
    return got;
  }
};

}  // namespace emulated

int main(int count, char** arguments) {
  return emulated::drive<emulated::Backward>(count, arguments);
}
