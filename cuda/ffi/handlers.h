// The FFI handlers, written once for every platform. A Backend says what it needs of XLA's context
// (a thread pool, a stream) and runs a problem that has been checked.
#pragma once

#include <array>
#include <optional>

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
    case StatusCode::kOk:
      return xla::ffi::Error::Success();
    case StatusCode::kInvalidArgument:
      return {ErrorCode::kInvalidArgument, status.message()};
    case StatusCode::kUnimplemented:
      return {ErrorCode::kUnimplemented, status.message()};
    case StatusCode::kInternal:
      return {ErrorCode::kInternal, status.message()};
  }
  return xla::ffi::Error::Internal("jax_flash2: unknown status code");
}

template <class Backend>
class Handlers {
 public:
  // A ragged target has one operand more, bounds, and a paged one the page table: the same handler
  // takes it where it is given.
  static std::array<Registration, 6> registrations() {
    return {{{"jax_flash2_forward", forward},
             {"jax_flash2_forward_ragged", forward},
             {"jax_flash2_backward", backward},
             {"jax_flash2_backward_ragged", backward},
             {"jax_flash2_decode", decoding},
             {"jax_flash2_decode_paged", decoding}}};
  }

 private:
  using Ffi = xla::ffi::Ffi;
  using Error = xla::ffi::Error;
  using Bounds = std::optional<AnyBuffer>;
  using Output = xla::ffi::Result<AnyBuffer>;
  using Context = typename Backend::Context;  // what XLA decodes Backend::ContextTag into

  template <class Problem, class Buffers, class Spec>
  static Error run(Context context, const Buffers& buffers, const Spec& spec) {
    Problem problem;
    if (Status s = decode(buffers, spec, problem); !s.ok()) return to_error(s);
    return to_error(Backend::run(problem, context));
  }

  static Error run_forward(Context context, AnyBuffer q, AnyBuffer k, AnyBuffer v, Bounds bounds,
                           Output out, Output lse, Output next_tile, AttentionSpec spec) {
    const ForwardBuffers buffers = {.q = q,
                                    .k = k,
                                    .v = v,
                                    .out = *out,
                                    .lse = *lse,
                                    .next_tile = *next_tile,
                                    .bounds = bounds};
    return run<ForwardProblem>(context, buffers, spec);
  }

  static Error run_backward(Context context, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer out,
                            AnyBuffer lse, AnyBuffer dout, AnyBuffer dlse, Bounds bounds, Output dq,
                            Output dk, Output dv, Output row_stats, Output dq_accum,
                            Output semaphores, Output dkv_partial, Output queues,
                            AttentionSpec spec) {
    const BackwardBuffers buffers = {.q = q,
                                     .k = k,
                                     .v = v,
                                     .out = out,
                                     .lse = lse,
                                     .dout = dout,
                                     .dlse = dlse,
                                     .dq = *dq,
                                     .dk = *dk,
                                     .dv = *dv,
                                     .row_stats = *row_stats,
                                     .dq_accum = *dq_accum,
                                     .semaphores = *semaphores,
                                     .dkv_partial = *dkv_partial,
                                     .queues = *queues,
                                     .bounds = bounds};
    return run<BackwardProblem>(context, buffers, spec);
  }

  static Error run_decoding(Context context, AnyBuffer q, AnyBuffer k, AnyBuffer v,
                            AnyBuffer lengths, std::optional<AnyBuffer> page_table, Output out,
                            Output lse, Output pieces, DecodeSpec spec) {
    const DecodeBuffers buffers = {.q = q,
                                   .k = k,
                                   .v = v,
                                   .lengths = lengths,
                                   .out = *out,
                                   .lse = *lse,
                                   .pieces = *pieces,
                                   .page_table = page_table};
    return run<DecodeProblem>(context, buffers, spec);
  }

  // XLA's bindings cannot be moved, only extended: hence the recursion on the count.
  template <int count>
  static auto operands() {
    if constexpr (count == 0) {
      return Ffi::Bind().template Ctx<typename Backend::ContextTag>();
    } else {
      return operands<count - 1>().template Arg<AnyBuffer>();
    }
  }

  template <int num_operands, int count>
  static auto operands_and_results() {
    if constexpr (count == 0) {
      return operands<num_operands>().template OptionalArg<AnyBuffer>();
    } else {
      return operands_and_results<num_operands, count - 1>().template Ret<AnyBuffer>();
    }
  }

  static XLA_FFI_Error* forward(XLA_FFI_CallFrame* frame) {
    static auto* const handler = operands_and_results<3, 3>()
                                     .template Attr<AttentionSpec>("spec")
                                     .To(run_forward, Backend::kTraits)
                                     .release();
    return handler->Call(frame);
  }

  static XLA_FFI_Error* backward(XLA_FFI_CallFrame* frame) {
    static auto* const handler = operands_and_results<7, 8>()
                                     .template Attr<AttentionSpec>("spec")
                                     .To(run_backward, Backend::kTraits)
                                     .release();
    return handler->Call(frame);
  }

  static XLA_FFI_Error* decoding(XLA_FFI_CallFrame* frame) {
    static auto* const handler = operands_and_results<4, 3>()
                                     .template Attr<DecodeSpec>("spec")
                                     .To(run_decoding, Backend::kTraits)
                                     .release();
    return handler->Call(frame);
  }
};

}  // namespace jax_flash2::ffi
