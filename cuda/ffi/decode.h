// Buffers and attributes of a call -> a problem. Everything is checked before any work starts, so a
// wrong call returns an error and leaves every result untouched; the kernels check nothing again.
#pragma once

#include <optional>
#include <string_view>

#include "core/decode.h"
#include "core/problem.h"
#include "core/spec.h"
#include "core/status.h"
#include "xla/ffi/api/ffi.h"

namespace jax_flash2::ffi {

using xla::ffi::AnyBuffer;

// Shapes as in core/problem.h, with any number of leading batch axes in the place of B.
struct ForwardBuffers {
  AnyBuffer q, k, v, out, lse, next_tile;
  std::optional<AnyBuffer> bounds = std::nullopt;
};

struct BackwardBuffers {
  AnyBuffer q, k, v, out, lse, dout, dlse, dq, dk, dv, row_stats, dq_accum, semaphores, dkv_partial,
      queues;
  std::optional<AnyBuffer> bounds = std::nullopt;
};

// k and v are [*B, S, K, H] and [*B, S, K, Hv]; with a page table, [pages, page size, K, H] and
// [pages, page size, K, Hv].
struct DecodeBuffers {
  AnyBuffer q, k, v, lengths, out, lse, pieces;
  std::optional<AnyBuffer> page_table = std::nullopt;
};

constexpr const char* name_of(BackwardMode mode) {
  return mode == BackwardMode::kFused   ? "fused"
         : mode == BackwardMode::kSplit ? "split"
                                        : "deterministic";
}

// A dtype by its name, and the attributes alone: for who has no buffers.
Status decode(std::string_view name, DType& dtype);
Status decode(const AttentionSpec& spec, ForwardProblem& problem);
Status decode(const AttentionSpec& spec, BackwardProblem& problem);

Status decode(const ForwardBuffers& buffers, const AttentionSpec& spec, ForwardProblem& problem);
Status decode(const BackwardBuffers& buffers, const AttentionSpec& spec, BackwardProblem& problem);
Status decode(const DecodeBuffers& buffers, const DecodeSpec& spec, DecodeProblem& problem);

}  // namespace jax_flash2::ffi
