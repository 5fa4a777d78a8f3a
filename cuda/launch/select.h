// Which kernels a call runs on a CUDA device, and why: decided here alone, for the launchers and for
// whoever asks. Plain C++ that needs no device.
#pragma once

#include <cstddef>
#include <iterator>
#include <string>
#include <type_traits>

#include "core/decode.h"
#include "core/problem.h"
#include "core/status.h"
#include "jax_flash2_config.h"

namespace jax_flash2::gpu {

struct Selection {
  bool sm90;               // the kernels made for Hopper; else those of every GPU since Ampere
  int head_dim;            // the smallest of kHeadDims that holds H and Hv
  const char* reason;      // for or against Hopper's
  BackwardMode mode = {};  // how the backward works, which need not be what was asked for
};

// `major` is that of the device's compute capability. Fails where no head dim is large enough.
Status select(const ForwardProblem& problem, int major, Selection& selection);
Status select(const BackwardProblem& problem, int major, Selection& selection);

// Does a call decode in clusters of Hopper's thread blocks? Where there is so little to do that it
// waits for latencies: each unit has a cluster, all at once, on half of the multiprocessors at most,
// since a cluster wants its blocks close together. What reads more is cut into parts of equal work
// for all multiprocessors.
bool decodes_in_clusters(const DecodeProblem& problem, int major, int multiprocessors);

// The code that a GPU of this compute capability takes out of `archs`, a list such as
// "80-real;90-real;80-virtual": machine code of its own major version, else PTX, else "".
std::string select_code(const std::string& archs, int major, int minor);

// f(d) with the smallest d of kDims that is not below the head dim, as a compile-time constant; the
// largest where all are.
template <const auto& kDims = kHeadDims, size_t kIndex = 0, typename F>
Status at_head_dim(int head_dim, const F& f) {
  if constexpr (kIndex + 1 < std::size(kDims)) {
    if (head_dim > kDims[kIndex]) return at_head_dim<kDims, kIndex + 1>(head_dim, f);
  }
  return f(std::integral_constant<int, kDims[kIndex]>());
}

}  // namespace jax_flash2::gpu
