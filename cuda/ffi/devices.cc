#include "ffi/devices.h"

#include <cuda_runtime.h>

#include "jax_flash2_config.h"
#include "launch/select.h"

namespace jax_flash2::ffi {

DeviceReport report_devices() {
  DeviceReport report;
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    cudaGetLastError();  // the error is not sticky: leave none behind for the kernels' launches
    report.error = cudaGetErrorString(error);
    return report;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    report.devices.push_back({properties.name, properties.major, properties.minor,
                              gpu::select_code(kCudaArchs, properties.major, properties.minor)});
  }
  return report;
}

}  // namespace jax_flash2::ffi
