// Decoding on CUDA: the smallest head dim that holds H and Hv, launched.
#include "launch/decode.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <random>

#include "launch/launch.h"
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
  return at_head_dim<kDecodeHeadDims>(
      std::max(shape.head_dim, shape.value_dim),
      [&](auto head_dim) { return launch_decode<head_dim>(problem, stream); });
}

}  // namespace jax_flash2::gpu
