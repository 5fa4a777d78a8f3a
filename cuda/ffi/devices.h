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

}  // namespace jax_flash2::ffi
