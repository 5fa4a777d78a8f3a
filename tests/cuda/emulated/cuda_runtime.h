// In place of CUDA's header of this name: the language and the runtime as far as cuda/ uses them, on the
// emulated machine.
#pragma once

#include <cmath>

#include "schedule.h"

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// Dynamic shared memory is declared `extern __shared__`, static memory `__shared__ __align__(n)`.
#define __shared__
#define __align__(bytes) static __attribute__((aligned(bytes)))

// ---- The language

struct dim3 {
  unsigned x;
  dim3(unsigned x = 1) : x(x) {}
};
inline dim3 gridDim;
// Of whoever runs.
inline struct {
  struct {
    operator unsigned() const { return emulated::machine.thread; }
  } x;
} threadIdx;
inline struct {
  struct {
    operator unsigned() const { return emulated::machine.block->index; }
  } x;
} blockIdx;

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
using std::memcpy;

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float __log2f(float x) { return std::log2(x); }
inline int atomicAdd(int* p, int x) {
  const int old = *p;
  *p += x;
  return old;
}

inline void __syncthreads() {
  emulated::Block& block = *emulated::machine.block;
  emulated::sync(block.barriers[0], int(block.fibers.size()));
}
inline void __syncwarp() {
  int none = 0;
  emulated::together("syncwarp", none, [](int**) {});
}
template <typename T>
T __shfl_sync(unsigned, T x, int from) {
  struct Lane {
    T x, result;
    int from;
  } mine = {x, x, from};
  emulated::together("shfl", mine, [](Lane** lanes) {
    for (int i = 0; i < 32; ++i) lanes[i]->result = lanes[lanes[i]->from]->x;
  });
  return mine.result;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int distance) {
  return __shfl_sync(mask, x, int(threadIdx.x % 32) ^ distance);
}
inline bool __any_sync(unsigned, bool x) {
  bool mine = x;
  emulated::together("vote", mine, [](bool** lanes) {
    bool any = false;
    for (int i = 0; i < 32; ++i) any |= *lanes[i];
    for (int i = 0; i < 32; ++i) *lanes[i] = any;
  });
  return mine;
}
inline bool __all_sync(unsigned mask, bool x) { return !__any_sync(mask, !x); }

// ---- The runtime

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = -1;  // of which the launchers remember nothing
  return cudaSuccess;
}
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int values[] = {emulated::machine.multiprocessors, 9, sizeof(jax_flash2::sm90::shared),
                        sizeof(jax_flash2::sm90::shared) + 1024};
  *value = values[attribute];
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= int(sizeof(jax_flash2::sm90::shared)) ? cudaSuccess : cudaErrorInvalidValue;
}
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
// The launch is over when this returns.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  if (config->numAttrs > 0) emulated::fail("clusters are not emulated");
  gridDim = config->gridDim;
  emulated::run_grid(config->gridDim.x, int(config->blockDim.x), int(config->dynamicSmemBytes),
                     [&] { kernel(arguments...); });
  return cudaSuccess;
}

// For the driver's entry points: cuda.h has the one that is asked for.
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned version,
                                             int flags, cudaDriverEntryPointQueryResult* found);
