// cpu::forward, cpu::backward and cpu::decode: the choice of kernels, the scratch memory, and the
// order in which the workers take the tasks.
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
  extern const DecodeKernels decode_kernels;     \
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
  const DecodeKernels& decode;
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
    return {"avx512bf16", avx512bf16::forward_kernels, avx512bf16::backward_kernels,
            avx512bf16::decode_kernels};
  }
  if (has_avx512 && limit != "avx2" && limit != "baseline") {
    return {"avx512", avx512::forward_kernels, avx512::backward_kernels, avx512::decode_kernels};
  }
  if (has_avx2 && limit != "baseline") {
    return {"avx2", avx2::forward_kernels, avx2::backward_kernels, avx2::decode_kernels};
  }
#endif
  return {"baseline", baseline::forward_kernels, baseline::backward_kernels,
          baseline::decode_kernels};
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

// The tiles of keys of all sequences, for each key/value head and block of rows, one after the
// other; a task is an equal part of them, whatever heads or sequences it begins and ends in.
Status decode(const DecodeProblem& problem, Executor& executor) try {
  const Shape& shape = problem.shape;
  if (shape.batch == 0 || shape.query_len == 0) return {};
  const DecodeKernels& choice = kernels().decode;
  const DecodeKernel& kernel = problem.dtype == DType::kFloat64 ? choice.real64 : choice.single;
  const int64_t rows = problem.rows(), row_blocks = (rows + kRowTile - 1) / kRowTile;
  const int64_t units = shape.kv_heads * row_blocks;  // of a sequence
  const auto keys_of = [&](int64_t b) { return problem.band(b).keys_of({0, shape.query_len}); };

  // Where each sequence begins. It has a tile at least: results are written where nothing is seen.
  std::vector<int64_t> first(shape.batch + 1);
  for (int64_t b = 0; b < shape.batch; ++b) {
    const Range keys = keys_of(b);
    const int tiles = (keys.end - keys.begin + kDecodeTile - 1) / kDecodeTile;
    first[b + 1] = first[b] + units * std::max(tiles, 1);
  }
  constexpr int64_t kMinTiles = 4, kTasksPerThread = 4;
  const int64_t total = first.back();
  const int64_t tasks =
      std::clamp<int64_t>(total / kMinTiles, 1, kTasksPerThread * executor.num_threads());
  const auto bound = [&](int64_t task) { return total * task / tasks; };
  const auto task_at = [&](int64_t tile) { return ((tile + 1) * tasks - 1) / total; };

  // A task may end one unit that others began, and begin one that others end: two partials. The
  // worker that adds the last one of a unit merges them, in their order; who began it counts.
  const size_t partial_bytes =
      std::min<int64_t>(rows, kRowTile) * (shape.value_dim + 2) * kernel.real_bytes;
  std::vector<char> partials(2 * tasks * partial_bytes);
  const auto partial = [&](int64_t task, bool begins) {
    return partials.data() + (2 * task + begins) * partial_bytes;
  };
  std::vector<std::atomic<int>> added(tasks);
  return run_tasks(executor, tasks, kernel.scratch_bytes, [&](int64_t task, void* scratch) {
    const int64_t end = bound(task + 1);
    for (int64_t at = bound(task), stop; at < end; at = stop) {
      const int64_t b = std::upper_bound(first.begin(), first.end(), at) - first.begin() - 1;
      const int64_t tiles = (first[b + 1] - first[b]) / units, unit = (at - first[b]) / tiles;
      const int64_t unit_begin = first[b] + unit * tiles, unit_end = unit_begin + tiles;
      stop = std::min(end, unit_end);
      const Head head = {b, static_cast<int>(unit / row_blocks)};
      const int64_t row = unit % row_blocks * kRowTile;
      const Rows block = {row, std::min(rows, row + kRowTile)};
      const Range all = keys_of(b);
      const int begin_tile = static_cast<int>(at - unit_begin);
      const int end_tile = static_cast<int>(stop - unit_begin);
      const Range keys = {all.begin + begin_tile * kDecodeTile,
                          std::min(all.end, all.begin + end_tile * kDecodeTile)};
      if (end_tile - begin_tile == tiles) {
        kernel.part(problem, head, block, keys, nullptr, scratch);
        continue;
      }
      kernel.part(problem, head, block, keys, partial(task, at == unit_begin), scratch);
      const int64_t first_task = task_at(unit_begin), last_task = task_at(unit_end - 1);
      if (added[first_task].fetch_add(1) < last_task - first_task) continue;
      std::vector<const void*> parts = {partial(first_task, true)};
      for (int64_t i = first_task + 1; i <= last_task; ++i) parts.push_back(partial(i, false));
      kernel.merge(problem, head, block, parts.data(), static_cast<int>(parts.size()), scratch);
    }
  });
} catch (const std::bad_alloc&) {
  return Status::internal("attention on the CPU: no memory for the parts of a decoding call");
}

}  // namespace jax_flash2::cpu
