// jax_flash2._cuda: the handlers of platform "CUDA". Imports without a driver: the CUDA runtime is
// linked in, and looks for the driver at its first call.
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <sstream>
#include <stdexcept>

#include "ffi/devices.h"
#include "ffi/module.h"
#include "jax_flash2_config.h"
#include "launch/launch.h"
#include "launch/select.h"

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
  static Status run(const DecodeProblem& problem, cudaStream_t stream) {
    return gpu::decode(problem, stream);
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

// What the handler of a pass would select, asked without a call.
template <class Problem>
gpu::Selection select(const Shape& shape, const std::string& dtype, const AttentionSpec& spec,
                      int major) {
  Problem problem = {};
  gpu::Selection selection;
  problem.shape = shape;
  Status status = decode(dtype, problem.dtype);
  if (status.ok()) status = decode(spec, problem);
  if (status.ok()) status = gpu::select(problem, major, selection);
  if (!status.ok()) throw std::invalid_argument(status.message());
  return selection;
}

nb::dict describe(const gpu::Selection& selection) {
  nb::dict entry;
  entry["family"] = selection.sm90 ? "sm90" : "sm80";
  entry["head_dim"] = selection.head_dim;
  entry["reason"] = selection.reason;
  return entry;
}

nb::dict select_both(int64_t batch, int query_len, int kv_len, int query_heads, int kv_heads,
                     int head_dim, int value_dim, const std::string& dtype, nb::dict attributes,
                     int major) {
  const Shape shape = {.batch = batch,
                       .query_len = query_len,
                       .kv_len = kv_len,
                       .query_heads = query_heads,
                       .kv_heads = kv_heads,
                       .head_dim = head_dim,
                       .value_dim = value_dim};
  AttentionSpec spec;
#define JAX_FLASH2_MEMBER(type, name) spec.name = nb::cast<type>(attributes[#name]);
  JAX_FLASH2_ATTENTION_SPEC(JAX_FLASH2_MEMBER)
#undef JAX_FLASH2_MEMBER
  const gpu::Selection backward = select<BackwardProblem>(shape, dtype, spec, major);
  nb::dict both;
  both["forward"] = describe(select<ForwardProblem>(shape, dtype, spec, major));
  both["backward"] = describe(backward);
  both["mode"] = name_of(backward.mode);
  return both;
}

}  // namespace
}  // namespace jax_flash2::ffi

NB_MODULE(_cuda, m) {
  using namespace jax_flash2::ffi;
  define_module<CudaBackend>(m);
  m.def("build_info", build_info, "What was compiled: archs, head_dims, nvcc.");
  m.def("device_report", device_report,
        "One dict a GPU: name, compute_capability, kernels (the code it runs; empty if none).");
  m.def("select", select_both, nanobind::arg("batch"), nanobind::arg("query_len"),
        nanobind::arg("kv_len"), nanobind::arg("query_heads"), nanobind::arg("kv_heads"),
        nanobind::arg("head_dim"), nanobind::arg("value_dim"), nanobind::arg("dtype"),
        nanobind::arg("spec"), nanobind::arg("major"),
        "For each pass of a call on a GPU of that major compute capability: family, head_dim, "
        "reason; and whether the backward works as the split mode.");
  m.def(
      "select_code",
      [](int major, int minor) {
        return jax_flash2::gpu::select_code(jax_flash2::kCudaArchs, major, minor);
      },
      nanobind::arg("major"), nanobind::arg("minor"),
      "The code of this build that a GPU of that compute capability runs; empty if none.");
  m.def(
      "driver_error", [] { return nanobind::str(report_devices().error.c_str()); },
      "Why device_report() is empty: what the CUDA runtime says; empty if there are devices.");
}
