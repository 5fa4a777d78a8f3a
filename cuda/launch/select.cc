#include "launch/select.h"

#include <algorithm>
#include <sstream>

#include "kernels/sm80/decode_plan.h"
#include "kernels/sm90/tiles_backward.h"

namespace jax_flash2::gpu {
namespace {

Status select_head_dim(const Shape& shape, Selection& selection) {
  const int needed = std::max(shape.head_dim, shape.value_dim);
  for (int head_dim : kHeadDims) {
    if (needed > head_dim) continue;
    selection.head_dim = head_dim;
    return {};
  }
  return Status::unimplemented("jax_flash2: head dim " + std::to_string(needed) +
                               " is beyond this build's largest, " +
                               std::to_string(*std::rbegin(kHeadDims)));
}

// Why the kernels made for Hopper cannot take a call, whichever pass; null if they can.
template <typename Problem>
const char* why_not_sm90(const Problem& problem, int major) {
  if (problem.family == Family::kSm80) return "these were asked for";
  if (major != 9) return "the GPU is not a Hopper";
  if (!kHasSm90) return "this build has no code for sm_90a";
  if (problem.dtype != DType::kFloat16 && problem.dtype != DType::kBFloat16)
    return "those made for Hopper take float16 and bfloat16";
  if (problem.shape.kv_len == 0) return "there are no keys";  // a tensor map has no empty side
  return nullptr;
}

Status select(const Shape& shape, const char* obstacle, Selection& selection) {
  selection.sm90 = obstacle == nullptr;
  selection.reason = obstacle != nullptr ? obstacle : "float16 or bfloat16 on a Hopper";
  return select_head_dim(shape, selection);
}

}  // namespace

Status select(const ForwardProblem& problem, int major, Selection& selection) {
  return select(problem.shape, why_not_sm90(problem, major), selection);
}

Status select(const BackwardProblem& problem, int major, Selection& selection) {
  if (Status s = select(problem.shape, why_not_sm90(problem, major), selection); !s.ok()) return s;
  selection.mode = problem.mode;
  if (!selection.sm90 || problem.mode == BackwardMode::kSplit) return {};
  // Measured (benchmarks/RESULTS.md): the zeros that sums in any order start from take longer than turns.
  constexpr int kFewKeys = 1024;
  if (problem.shape.kv_len <= kFewKeys) selection.mode = BackwardMode::kDeterministic;
  if (!sm90::backward_tiles(selection.head_dim).fuses_dq()) selection.mode = BackwardMode::kSplit;
  return {};
}

bool decodes_in_clusters(const DecodeProblem& problem, int major, int multiprocessors) {
  const Shape& shape = problem.shape;
  const int64_t most_keys =
      std::min(int64_t{shape.kv_len}, int64_t{problem.window_left} + shape.query_len);
  return kHasSm90 && major == 9 &&
         (problem.dtype == DType::kFloat16 || problem.dtype == DType::kBFloat16) &&
         problem.rows() <= sm80::kDecodeFewRows && most_keys <= sm80::kDecodeClusterKeys &&
         shape.batch * shape.kv_heads * sm80::kDecodeCluster * 2 <= multiprocessors;
}

std::string select_code(const std::string& archs, int major, int minor) {
  const int capability = 10 * major + minor;
  int machine_code = 0, ptx = 0;
  std::istringstream list(archs);
  for (std::string arch; std::getline(list, arch, ';');) {
    const int version = std::stoi(arch);
    if (version > capability) continue;
    // "80" alone stands for both, as in CMake.
    if (arch.find("virtual") == std::string::npos && version / 10 == major) {
      machine_code = std::max(machine_code, version);
    }
    if (arch.find("real") == std::string::npos) ptx = std::max(ptx, version);
  }
  if (machine_code > 0) return "sm_" + std::to_string(machine_code);
  if (ptx > 0)
    return "compute_" + std::to_string(ptx) + " PTX, compiled by the driver at first use";
  return "";
}

}  // namespace jax_flash2::gpu
