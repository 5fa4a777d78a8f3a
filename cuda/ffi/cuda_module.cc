// jax_flash2._cuda: the handlers of platform "CUDA". Imports without a driver: the CUDA runtime is
// linked in, and looks for the driver at its first call.
#include <sstream>

#include "ffi/devices.h"
#include "ffi/module.h"
#include "jax_flash2_config.h"
#include "launch/launch.h"

namespace jax_flash2::ffi {
namespace {

namespace nb = nanobind;

struct CudaBackend {
  using ContextTag = xla::ffi::PlatformStream<cudaStream_t>;
  using Context = cudaStream_t;
  static constexpr std::initializer_list<xla::ffi::Traits> kTraits = {
      xla::ffi::Traits::kCmdBufferCompatible};

  static Status run(const ForwardProblem& problem, cudaStream_t stream) {
    return gpu::forward(problem, stream);
  }
  static Status run(const BackwardProblem& problem, cudaStream_t stream) {
    return gpu::backward(problem, stream);
  }
};

nb::dict build_info() {
  nb::dict info;
  nb::list archs, head_dims;
  std::istringstream list(kCudaArchs);
  for (std::string arch; std::getline(list, arch, ';');) archs.append(arch.c_str());
  for (int head_dim : kHeadDims) head_dims.append(head_dim);
  info["archs"] = archs;
  info["head_dims"] = head_dims;
  info["nvcc"] = kNvccVersion;
  return info;
}

nb::list device_report() {
  nb::list devices;
  for (const Device& device : report_devices().devices) {
    nb::dict entry;
    entry["name"] = device.name.c_str();
    entry["compute_capability"] = nb::make_tuple(device.major, device.minor);
    entry["kernels"] = device.kernels.c_str();
    devices.append(entry);
  }
  return devices;
}

}  // namespace
}  // namespace jax_flash2::ffi

NB_MODULE(_cuda, m) {
  using namespace jax_flash2::ffi;
  define_module<CudaBackend>(m);
  m.def("build_info", build_info, "What was compiled: archs, head_dims, nvcc.");
  m.def("device_report", device_report,
        "One dict a GPU: name, compute_capability, kernels (the code it runs; empty if none).");
  m.def(
      "driver_error", [] { return nanobind::str(report_devices().error.c_str()); },
      "Why device_report() is empty: what the CUDA runtime says; empty if there are devices.");
}
