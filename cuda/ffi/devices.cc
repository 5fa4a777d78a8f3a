#include "ffi/devices.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <sstream>

#include "jax_flash2_config.h"

namespace jax_flash2::ffi {

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
                              select_code(kCudaArchs, properties.major, properties.minor)});
  }
  return report;
}

}  // namespace jax_flash2::ffi
