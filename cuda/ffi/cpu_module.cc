// jax_flash2._cpu: the handlers of platform "cpu".
#include "cpu/cpu.h"
#include "ffi/executor.h"
#include "ffi/module.h"
#include "jax_flash2_config.h"

namespace jax_flash2::ffi {
namespace {

struct CpuBackend {
  using ContextTag = xla::ffi::ThreadPool;
  using Context = xla::ffi::ThreadPool;
  static constexpr std::initializer_list<xla::ffi::Traits> kTraits = {};

  static Status run(const ForwardProblem& problem, Context pool) {
    PoolExecutor executor(pool);
    return cpu::forward(problem, executor);
  }
  static Status run(const BackwardProblem& problem, Context pool) {
    PoolExecutor executor(pool);
    return cpu::backward(problem, executor);
  }
  static Status run(const DecodeProblem& problem, Context pool) {
    PoolExecutor executor(pool);
    return cpu::decode(problem, executor);
  }
};

}  // namespace
}  // namespace jax_flash2::ffi

NB_MODULE(_cpu, m) {
  jax_flash2::ffi::define_module<jax_flash2::ffi::CpuBackend>(m);
  m.def("instruction_set", jax_flash2::cpu::instruction_set,
        "That of the kernels that this machine runs: avx512bf16, avx512, avx2 or baseline.");
  m.def(
      "cuda_skipped", [] { return jax_flash2::kCudaSkipped; },
      "Why this build has no CUDA kernels; empty if it has.");
}
