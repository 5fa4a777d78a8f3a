// The host's kernels as one instruction set offers them. forward.cc, backward.cc and decode.cc are
// compiled once for each (JAX_FLASH2_CPU_ISA names it); attention.cc chooses one at run time, and
// does all that is not arithmetic: memory, threads, the order of the work.
//
// Those files call no inline function of the standard library and keep their own functions in
// unnamed namespaces: what the linker merges between translation units would otherwise be code for
// a CPU that this machine may not have.
#pragma once

#include <cstddef>

#include "core/decode.h"
#include "core/problem.h"

namespace jax_flash2::cpu {

// A row is one query head of a group at one token: row r of a key/value head is token r / group,
// head r % group. Rows of a group meet the same keys, so that they share the packed K and V.
struct Rows {
  int64_t begin, end;
};

// One key/value head of one sequence.
struct Head {
  int64_t b;
  int k;
};

// A task of the forward has a multiple of kRowTile rows, at most kMaxRowBlock.
inline constexpr int kRowTile = 64;
inline constexpr int kMaxRowBlock = 256;
// A task of the backward has this many keys; dQ is added up by blocks of this many rows.
inline constexpr int kKeyBlock = 128;
inline constexpr int kRowBlock = 64;

struct ForwardKernel {
  size_t scratch_bytes;  // of a worker, 64-byte aligned
  // out and lse of the rows.
  void (*run)(const ForwardProblem&, Head, Rows, void* scratch);
};

struct ForwardKernels {
  ForwardKernel single;    // computes in float32
  ForwardKernel real64;    // in float64
  ForwardKernel bfloat16;  // products of bfloat16, sums in float32; `single` where there are none
};

struct BackwardKernel {
  size_t scratch_bytes;
  // delta and scaled_lse of the rows; dq = 0 where a row sees nothing.
  void (*prepare)(const BackwardProblem&, Head, Rows, void* scratch);
  // dk and dv of keys [key_block * kKeyBlock, ...). With `turns`, dq too: entry i counts the key
  // blocks that have been added to row block i, and each block waits for its turn.
  void (*keys)(const BackwardProblem&, Head, int key_block, int* turns, void* scratch);
  // dq of the rows.
  void (*rows)(const BackwardProblem&, Head, Rows, void* scratch);
};

struct BackwardKernels {
  BackwardKernel single, real64, bfloat16;
};

// Keys of a tile, by which the work of decoding is divided.
inline constexpr int kDecodeTile = 64;

struct DecodeKernel {
  size_t scratch_bytes;
  int real_bytes;  // of a number in `partial`
  // Attention of at most kRowTile rows over some of the keys. `partial`, [rows, Hv + 2], gets each
  // row's O, not yet divided, then m and l; null where the keys are all that there are: then out
  // and lse.
  void (*part)(const DecodeProblem&, Head, Rows, Range keys, void* partial, void* scratch);
  // out and lse of the rows from the `count` partials of all keys.
  void (*merge)(const DecodeProblem&, Head, Rows, const void* const* partials, int count,
                void* scratch);
};

struct DecodeKernels {
  DecodeKernel single, real64;
};

// Lets another thread run; for waiting loops.
void yield();

}  // namespace jax_flash2::cpu
