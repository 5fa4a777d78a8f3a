// Decoding on CUDA: the smallest head dim that holds H and Hv, launched.
#include "launch/decode.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <random>

#include "launch/launch.h"
#include "launch/launch_util.h"
#include "launch/select.h"

namespace jax_flash2::gpu {

static_assert(kDecodeHeadDims[std::size(kDecodeHeadDims) - 1] >= kMaxHeadDim,
              "JAX_FLASH2_DECODE_HEAD_DIMS must reach the largest head dim");

// A random start, and from there a walk that scatters all bits (splitmix64).
uint64_t number_of_launch() {
  static std::atomic<uint64_t> state = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
  }();
  uint64_t x = state.fetch_add(0x9e3779b97f4a7c15u);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

Status decode(const DecodeProblem& problem, cudaStream_t stream) {
  const Shape& shape = problem.shape;
  if (shape.batch == 0 || shape.query_len == 0) return {};
  int major = 0, multiprocessors = 0;
  if (Status s = compute_capability_major(major); !s.ok()) return s;
  if (Status s = multiprocessor_count(multiprocessors); !s.ok()) return s;
  const bool clusters = decodes_in_clusters(problem, major, multiprocessors);
  return at_head_dim<kDecodeHeadDims>(std::max(shape.head_dim, shape.value_dim),
                                      [&](auto head_dim) {
                                        if constexpr (kHasSm90) {
                                          if (clusters)
                                            return launch_decode_sm90<head_dim>(problem, stream);
                                        }
                                        return launch_decode<head_dim>(problem, stream);
                                      });
}

}  // namespace jax_flash2::gpu
