// What a launcher or a host routine reports. Floor 0: plain C++.
#pragma once

#include <string>
#include <utility>

namespace jax_flash2 {

enum class StatusCode {
  kOk,
  kInvalidArgument,  // the call is wrong: shapes, dtypes, attributes
  kUnimplemented,    // the call is right, and this build has no kernel for it
  kInternal,         // the CUDA runtime refused
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  static Status invalid_argument(std::string text) {
    return Status(StatusCode::kInvalidArgument, std::move(text));
  }
  static Status unimplemented(std::string text) {
    return Status(StatusCode::kUnimplemented, std::move(text));
  }
  static Status internal(std::string text) {
    return Status(StatusCode::kInternal, std::move(text));
  }

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  Status(StatusCode code, std::string text) : code_(code), message_(std::move(text)) {}

  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

}  // namespace jax_flash2
