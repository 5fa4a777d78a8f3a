// The four FFI handlers, written once for every platform. A Backend names XLA's context (thread pool
// or stream), the handler's traits, and runs a checked problem.
#pragma once

#include <array>

#include "core/status.h"
#include "ffi/decode.h"
#include "ffi/spec_decoding.h"
#include "xla/ffi/api/ffi.h"

namespace jax_flash2::ffi {

struct Registration {
  const char* target;
  XLA_FFI_Handler* handler;
};

inline xla::ffi::Error to_error(const Status& status) {
  using xla::ffi::ErrorCode;
  switch (status.code()) {
    case StatusCode::kOk: return xla::ffi::Error::Success();
    case StatusCode::kInvalidArgument: return {ErrorCode::kInvalidArgument, status.message()};
    case StatusCode::kUnimplemented: return {ErrorCode::kUnimplemented, status.message()};
    case StatusCode::kInternal: return {ErrorCode::kInternal, status.message()};
  }
  return xla::ffi::Error::Internal("jax_flash2: unknown status code");
}

template <class Backend>
class Handlers {
 public:
  static std::array<Registration, 4> registrations() {
    return {{{"jax_flash2_forward", forward<>},
             {"jax_flash2_forward_ragged", forward<AnyBuffer>},
             {"jax_flash2_backward", backward<>},
             {"jax_flash2_backward_ragged", backward<AnyBuffer>}}};
  }

 private:
  using Error = xla::ffi::Error;
  using Ffi = xla::ffi::Ffi;
  using Output = xla::ffi::Result<AnyBuffer>;
  using Context = typename Backend::Context;  // what XLA decodes Backend::Binding into

  template <class Problem, class Buffers>
  static Error run(Context context, const Buffers& buffers, const AttentionSpec& spec) {
    Problem problem;
    if (Status s = decode(buffers, spec, problem); !s.ok()) return to_error(s);
    return to_error(Backend::run(problem, context));
  }

  // Bounds is empty, or one AnyBuffer for the ragged targets.
  template <class... Bounds>
  static XLA_FFI_Error* forward(XLA_FFI_CallFrame* frame) {
    static auto* const handler =
        Ffi::Bind()
            .Ctx<typename Backend::Binding>()
            .template Arg<AnyBuffer>()  // q
            .template Arg<AnyBuffer>()  // k
            .template Arg<AnyBuffer>()  // v
            ...
  }
};

}  // namespace jax_flash2::ffi
