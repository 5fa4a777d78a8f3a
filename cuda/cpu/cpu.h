// The host's attention: the same problem and the same band as the CUDA kernels. Built everywhere.
#pragma once

#include <functional>

#include "core/decode.h"
#include "core/problem.h"
#include "core/status.h"

namespace jax_flash2::cpu {

// Where worker threads come from; the FFI layer wraps XLA's own pool.
class Executor {
 public:
  virtual ~Executor() = default;
  // Threads that may work at once, the calling one included; at least 1.
  virtual int num_threads() const = 0;
  // Calls body(0) ... body(workers - 1), body(0) on the calling thread; returns when all have.
  // A worker may start late or only after others have ended: bodies must not wait for each other.
  virtual void run(int workers, const std::function<void(int worker)>& body) = 0;
};

// That of the kernels that this machine runs: "avx512bf16", "avx512", "avx2" or "baseline".
const char* instruction_set();

Status forward(const ForwardProblem& problem, Executor& executor);
Status backward(const BackwardProblem& problem, Executor& executor);
Status decode(const DecodeProblem& problem, Executor& executor);

}  // namespace jax_flash2::cpu
