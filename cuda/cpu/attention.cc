// cpu::forward and cpu::backward: the choice of kernels, the scratch memory, and the order in which
// the workers take the tasks.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/kernels.h"

namespace jax_flash2::cpu {

#define JF2_DECLARE_KERNELS(isa)                 \
  namespace isa {                                \
  extern const ForwardKernels forward_kernels;   \
  extern const BackwardKernels backward_kernels; \
  }
JF2_DECLARE_KERNELS(baseline)
#ifdef JAX_FLASH2_CPU_X86
JF2_DECLARE_KERNELS(avx2)
JF2_DECLARE_KERNELS(avx512)
JF2_DECLARE_KERNELS(avx512bf16)
#endif
#undef JF2_DECLARE_KERNELS

void yield() { std::this_thread::yield(); }

namespace {

struct Kernels {
  const char* instruction_set;
  const ForwardKernels& forward;
  const BackwardKernels& backward;
};

// The best that this machine runs, or less where the environment asks for it (for tests).
Kernels choose_kernels() {
#ifdef JAX_FLASH2_CPU_X86
  const char* wish = std::getenv("JAX_FLASH2_CPU_ISA");
  const std::string_view limit = wish != nullptr ? wish : "";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16") && limit.empty()) {
    return {"avx512bf16", avx512bf16::forward_kernels, avx512bf16::backward_kernels};
  }
  if (has_avx512 && limit != "avx2" && limit != "baseline") {
    return {"avx512", avx512::forward_kernels, avx512::backward_kernels};
  }
  if (has_avx2 && limit != "baseline") {
    return {"avx2", avx2::forward_kernels, avx2::backward_kernels};
  }
#endif
  return {"baseline", baseline::forward_kernels, baseline::backward_kernels};
}

template <class Kernel>
const auto& for_dtype(const Kernel& kernels, DType type) {
  return type == DType::kFloat64    ? kernels.real64
         : type == DType::kBFloat16 ? kernels.bfloat16
                                    : kernels.single;
}

const Kernels& kernels() {
  static const Kernels chosen = choose_kernels();
  return chosen;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Calls body(task, scratch) for every task: rising order, each worker takes the next one.
template <class Body>
Status run_tasks(Executor& executor, int64_t tasks, size_t scratch_bytes, const Body& body) {
  if (tasks == 0) return {};
  constexpr size_t kPage = 4096;
  const int workers = static_cast<int>(std::min<int64_t>(executor.num_threads(), tasks));
  const size_t stride = (scratch_bytes + kPage - 1) / kPage * kPage;
  const std::unique_ptr<char, Free> scratch(
      static_cast<char*>(std::aligned_alloc(kPage, workers * stride)));
  if (scratch == nullptr) {
    return Status::internal("attention on the CPU: no memory for " + std::to_string(workers) +
                            " workers of " + std::to_string(stride) + " bytes each");
  }
  std::atomic<int64_t> next = 0;
  executor.run(workers, [&](int worker) {
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
      body(task, scratch.get() + worker * stride);
    }
  });
  return {};
}

// The key/value heads of all sequences, and their rows.
struct Heads {
  explicit Heads(const Shape& shape)
      : kv_heads(shape.kv_heads),
        number(shape.batch * shape.kv_heads),
        rows(int64_t{shape.query_len} * (shape.kv_heads > 0 ? shape.group() : 0)) {}

  Head at(int64_t i) const { return {i / kv_heads, static_cast<int>(i % kv_heads)}; }
  int64_t row_blocks(int64_t size) const { return (rows + size - 1) / size; }
  Rows row_block(int64_t i, int64_t size) const {
    return {i * size, std::min(rows, (i + 1) * size)};
  }

  int kv_heads;
  int64_t number, rows;
};

}  // namespace

const char* instruction_set() { return kernels().instruction_set; }

Status forward(const ForwardProblem& problem, Executor& executor) {
  const ForwardKernel& kernel = for_dtype(kernels().forward, problem.dtype);
  const Heads heads(problem.shape);
  // Large blocks share one packing of K and V among more rows; small ones keep all workers busy.
  int64_t size = kMaxRowBlock;
  while (size > kRowTile && heads.number * heads.row_blocks(size) < 4 * executor.num_threads()) {
    size /= 2;
  }
  const int64_t blocks = heads.row_blocks(size);
  return run_tasks(
      executor, heads.number * blocks, kernel.scratch_bytes, [&](int64_t task, void* scratch) {
        // With a causal band the last rows have the most work: they go first.
        const int64_t block = blocks - 1 - task / heads.number;
        kernel.run(problem, heads.at(task % heads.number), heads.row_block(block, size), scratch);
      });
}

Status backward(const BackwardProblem& problem, Executor& executor) try {
  const BackwardKernel& kernel = for_dtype(kernels().backward, problem.dtype);
  const Heads heads(problem.shape);
  constexpr int64_t kPrepared = 1024;
  Status status =
      run_tasks(executor, heads.number * heads.row_blocks(kPrepared), kernel.scratch_bytes,
                [&](int64_t task, void* scratch) {
                  kernel.prepare(problem, heads.at(task % heads.number),
                                 heads.row_block(task / heads.number, kPrepared), scratch);
                });
  if (!status.ok()) return status;

  const int64_t row_blocks = heads.row_blocks(kRowBlock);
  const int64_t key_tasks = heads.number * ((problem.shape.kv_len + kKeyBlock - 1) / kKeyBlock);
  const bool split = problem.mode == BackwardMode::kSplit;
  const int64_t row_tasks = split ? heads.number * row_blocks : 0;
  std::vector<int> turns(split ? 0 : heads.number * row_blocks);
  // With a causal band the first keys and the last rows have the most work: they go first.
  return run_tasks(
      executor, key_tasks + row_tasks, kernel.scratch_bytes, [&](int64_t task, void* scratch) {
        const Head head = heads.at(task % heads.number);
        if (task < key_tasks) {
          kernel.keys(problem, head, static_cast<int>(task / heads.number),
                      split ? nullptr : turns.data() + task % heads.number * row_blocks, scratch);
        } else {
          const int64_t block = row_blocks - 1 - (task - key_tasks) / heads.number;
          kernel.rows(problem, head, heads.row_block(block, kRowBlock), scratch);
        }
      });
} catch (const std::bad_alloc&) {
  return Status::internal("attention on the CPU: no memory for the order of dq's blocks");
}

}  // namespace jax_flash2::cpu
