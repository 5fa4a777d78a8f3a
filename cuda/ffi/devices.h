// The GPUs of this machine, and what this build has for them.
#pragma once

#include <string>
#include <vector>

namespace jax_flash2::ffi {

struct Device {
  std::string name;
  int major, minor;     // compute capability
  std::string kernels;  // the code it would run, "" if this build has none for it
};

struct DeviceReport {
  std::string error;  // what the driver says where it finds no device, else ""
  std::vector<Device> devices;
};

// Never fails: without a driver the report is empty and says why.
DeviceReport report_devices();

// The code that a GPU of this compute capability takes out of `archs`, a list such as
// "80-real;90-real;80-virtual": machine code of its own major version, else PTX, else "".
std::string select_code(const std::string& archs, int major, int minor);

}  // namespace jax_flash2::ffi
