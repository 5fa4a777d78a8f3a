// Launchers of decoding in clusters at one head dim. Compiled for sm_90a alone.
#pragma once

#include "kernels/sm80/decode_cluster.cuh"
#include "launch/decode_instance.cuh"

namespace jax_flash2::gpu {

template <int kHeadDim>
Status launch_decode_sm90(const DecodeProblem& problem, cudaStream_t stream) {
  const auto launch_math = [&]<typename Math>(Math) {
    using Config = sm80::DecodeConfig<Math, kHeadDim, false, sm80::kDecodeCluster>;
    return launch_decode_config<Config>(problem, stream);
  };
  return problem.dtype == DType::kBFloat16 ? launch_math(BFloat16()) : launch_math(Float16());
}

}  // namespace jax_flash2::gpu
