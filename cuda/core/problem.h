// What a kernel is asked to do: shapes, dtypes and pointers, the same for CUDA and for the host.
// Floor 0: plain C++. Every buffer is dense and row-major; the shape stands beside each pointer.
//
// Letters (as in the public contract): B batch (all leading axes flattened), T query length, S
// key/value length, N query heads, K key/value heads (N % K == 0, query head n reads head n / (N /
// K)), H head dim of query and key, Hv head dim of value. H and Hv are multiples of 8 (Python
// pads).
#pragma once

#include <cstdint>

#include "core/mask.h"

namespace jax_flash2 {

enum class DType { kFloat16, kBFloat16, kFloat32, kFloat64 };
enum class Precision { kDefault, kHigh, kHighest };
enum class BackwardMode { kFused, kDeterministic, kSplit };
// Which CUDA kernels may run: the best for the device, or the sm_80 class that every GPU has.
enum class Family { kAuto, kSm80 };

inline constexpr int kMaxHeadDim = 256;
// Workspaces are padded to whole tiles: T to kTokenTile, H to the next of kHeadDimTile. Every tile
// size of every kernel divides kTokenTile. jax_flash2/_ffi.py reads both from the module.
inline constexpr int kTokenTile = 128;
inline constexpr int kHeadDimTile = 64;
// Deterministic mode counts per this many query rows: the smallest tile of a backward kernel.
inline constexpr int kSemaphoreRows = 16;

JF2_HOST_DEVICE constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

struct Shape {
  int64_t batch;    // B
  int query_len;    // T
  int kv_len;       // S
  int query_heads;  // N
  int kv_heads;     // K
  int head_dim;     // H
  int value_dim;    // Hv

  JF2_HOST_DEVICE int group() const { return query_heads / kv_heads; }
};

// Parts of a group's query heads whose shares of dK and dV the backward computes side by side and
// sums afterwards. Few key blocks leave a GPU idle, or most of it waiting for the last; so the
// smallest divisor of the group is taken that makes eight thread blocks for each of an H200's 132
// multiprocessors. The partial sums stay below N T (H + Hv) floats, twice those of dQ. The one rule
// for every platform: it fixes the shape of a workspace, which Python declares.
constexpr int group_splits(const Shape& shape) {
  constexpr int64_t kBlocks = 8 * 132;
  const int64_t group = shape.query_heads / shape.kv_heads;
  const int64_t blocks =
      shape.batch * shape.kv_heads * ((int64_t{shape.kv_len} + kTokenTile - 1) / kTokenTile);
  int splits = 1;
  for (int parts = 2; parts <= group && blocks * splits < kBlocks; ++parts) {
    if (group % parts == 0 && parts * int64_t{shape.kv_len} <= group * shape.query_len) {
      splits = parts;
    }
  }
  return splits;
}

// P = softmax(scale * Q K^T + mask), O = P V, LSE = log sum exp of the row; a row that sees nothing
// has O = 0 and LSE = -inf.
struct ForwardProblem {
  Shape shape;
  DType dtype;          // of q, k, v, out
  Precision precision;  // float32 only
  Family family;
  double scale;  // positive: Python folds its sign into q
  BandSpec band;
  const void* q;       // [B, T, N, H]
  const void* k;       // [B, S, K, H]
  const void* v;       // [B, S, K, Hv]
  void* out;           // [B, T, N, Hv]
  void* lse;           // [B, N, T], float32 (float64 where dtype is), natural log
  int32_t* next_tile;  // [B], a workspace: the queue of tiles of persistent kernels
};

// What the backward needs to know of each query row, a plane of `row_stats` each. The sm_90a kernels
// take the same as terms of a sum instead (device/row_terms.cuh), which fill three planes.
enum RowStat {
  kDelta,      // D
  kScaledLse,  // LSE * log2(e), +inf where the row sees nothing
  kRowStats = 3
};

// What the persistent kernels of a backward take in turn: pieces handed out, the first sequence's count
// for all.
enum Queue { kKeyBlocks, kQueryTiles, kQueues };

// D = rowsum(dO * O) - dLSE, dP = dO V^T, dS = P * (dP - D),
// dQ = scale * dS K, dK = scale * dS^T Q, dV = P^T dO; dK and dV are summed over the heads of a
// group.
struct BackwardProblem {
  Shape shape;
  DType dtype;  // of everything that is not said to be float32
  Precision precision;
  BackwardMode mode;
  Family family;
  double scale;  // positive
  BandSpec band;
  const void* q;     // [B, T, N, H]
  const void* k;     // [B, S, K, H]
  const void* v;     // [B, S, K, Hv]
  const void* out;   // [B, T, N, Hv]
  const void* lse;   // [B, N, T], float32 (float64 where dtype is)
  const void* dout;  // [B, T, N, Hv]
  const void* dlse;  // [B, N, T], as lse
  void* dq;          // [B, T, N, H]
  void* dk;          // [B, S, K, H]
  void* dv;          // [B, S, K, Hv]
  // Workspaces: declared results, so that XLA plans their memory; uninitialised on entry.
  void* row_stats;  // [B, N, kRowStats, Tp] as lse; Tp = round_up(T, kTokenTile); see RowStat
  void* dq_accum;   // [B, N, Tp, Hp] float32 (Hp = round_up(H, kHeadDimTile)); null in split mode
  int32_t* semaphores;  // [B, N, Tp / kSemaphoreRows]; null in split mode
  float* dkv_partial;  // [B, group_splits, S, K, H + Hv]: shares of dK and dV; null if there is one
  int group_splits;    // parts of a group, a divisor of N / K; 1 where a thread block does it whole
  int32_t* queues;     // [B, kQueues], a workspace: of persistent kernels; see Queue
};

}  // namespace jax_flash2
