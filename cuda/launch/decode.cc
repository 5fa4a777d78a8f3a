// Decoding on CUDA.
#include "launch/launch.h"

namespace jax_flash2::gpu {

Status decode(const DecodeProblem&, cudaStream_t) {
  return Status::unimplemented("jax_flash2: decode_attention has no CUDA kernel yet");
}

}  // namespace jax_flash2::gpu
