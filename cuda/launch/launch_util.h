// What every launcher needs around a kernel: attributes set once, errors as a Status. CUDA only.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <mutex>
#include <string>

#include "core/status.h"

namespace jax_flash2::gpu {

// The status of a runtime call. Clears the thread's last error: it is reported here, and must not
// surface again in somebody else's check.
inline Status cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();
  return Status::internal(std::string("jax_flash2: ") + what + ": " + cudaGetErrorName(error) +
                          ": " + cudaGetErrorString(error));
}

// A positive attribute of the current device, asked once a device.
template <cudaDeviceAttr kAttribute>
Status device_attribute(int& value) {
  static std::array<std::atomic<int>, 64> cache = {};
  int device = 0;
  if (Status s = cuda_status(cudaGetDevice(&device), "cudaGetDevice"); !s.ok()) return s;
  const bool cached = device >= 0 && device < static_cast<int>(cache.size());
  if (cached && (value = cache[device].load()) > 0) return {};
  Status s = cuda_status(cudaDeviceGetAttribute(&value, kAttribute, device),
                         "reading an attribute of the device");
  if (s.ok() && cached) cache[device].store(value);
  return s;
}
inline Status multiprocessor_count(int& count) {
  return device_attribute<cudaDevAttrMultiProcessorCount>(count);
}
// 9 on Hopper.
inline Status compute_capability_major(int& major) {
  return device_attribute<cudaDevAttrComputeCapabilityMajor>(major);
}
// The dynamic shared memory that a thread block may ask for, in bytes.
inline Status shared_memory_limit(int& bytes) {
  return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(bytes);
}
// The shared memory that the blocks on a multiprocessor have together.
inline Status shared_memory_of_multiprocessor(int& bytes) {
  return device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(bytes);
}

// Thread blocks of a persistent kernel: one a multiprocessor, or as many as there are pieces of work.
// It counts the pieces in an int32, somewhat beyond the last.
inline Status persistent_blocks(int64_t work, int64_t& blocks) {
  int multiprocessors = 0;
  if (Status s = multiprocessor_count(multiprocessors); !s.ok()) return s;
  if (work > std::numeric_limits<int32_t>::max() - 2 * int64_t{multiprocessors}) {
    return Status::invalid_argument("jax_flash2: batch * heads * sequence makes " +
                                    std::to_string(work) +
                                    " tiles, a queue holds about 2**31: split the batch");
  }
  blocks = work < multiprocessors ? work : multiprocessors;
  return {};
}

struct LaunchConfig {
  int64_t blocks;
  int threads;
  int shared_bytes;  // dynamic
  cudaStream_t stream;
  int cluster = 1;  // thread blocks of a cluster
};

// Lets kKernel ask for so much dynamic shared memory on a device. The limit is only ever raised, and
// beyond the capacity simply set again.
template <auto kKernel>
Status raise_shared_memory(int device, int bytes) {
  static std::array<std::atomic<int>, 64> raised = {};
  static std::mutex one_at_a_time;
  const bool known = device >= 0 && device < static_cast<int>(raised.size());
  if (known && bytes <= raised[device].load()) return {};
  const std::lock_guard lock(one_at_a_time);
  if (known && bytes <= raised[device].load()) return {};
  Status s = cuda_status(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                              cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                         "raising a kernel's shared memory limit");
  if (s.ok() && known) raised[device].store(bytes);
  return s;
}

// Launches kKernel on a one-dimensional grid; no blocks, no launch. A CUDA graph may be capturing.
template <auto kKernel, typename... Args>
Status launch(const LaunchConfig& config, const Args&... args) {
  if (config.blocks == 0) return {};
  if (config.blocks > std::numeric_limits<int32_t>::max()) {
    return Status::invalid_argument("jax_flash2: batch * heads * sequence needs " +
                                    std::to_string(config.blocks) +
                                    " thread blocks, a grid holds 2**31 - 1: split the batch");
  }
  int device = 0;
  if (Status s = cuda_status(cudaGetDevice(&device), "cudaGetDevice"); !s.ok()) return s;
  if (Status s = raise_shared_memory<kKernel>(device, config.shared_bytes); !s.ok()) return s;
  cudaLaunchConfig_t launch_config = {};
  launch_config.gridDim = dim3(static_cast<unsigned>(config.blocks));
  launch_config.blockDim = dim3(static_cast<unsigned>(config.threads));
  launch_config.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
  launch_config.stream = config.stream;
  cudaLaunchAttribute cluster = {};
  if (config.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(config.cluster), 1, 1};
    launch_config.attrs = &cluster;
    launch_config.numAttrs = 1;
  }
  return cuda_status(cudaLaunchKernelEx(&launch_config, kKernel, args...), "launching a kernel");
}

}  // namespace jax_flash2::gpu
