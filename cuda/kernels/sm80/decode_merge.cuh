// What becomes of a unit: its results, or, where several thread blocks share it, what each leaves
// behind and how one puts it together.
//
// A block works through its part from front to back. So of a shared unit, the block that has its
// beginning gets there last, and merges: the others have had their piece first thing. A piece is O,
// m and l of its rows, in the workspace; then a flag says so. A flag is up when it holds the
// launch's own random number: no memory has to be cleared before a launch, and who merges takes
// it down again, for a launch that repeats its number (a CUDA graph).
#pragma once

#include "device/softmax.cuh"
#include "kernels/sm80/decode_shared.cuh"

namespace jax_flash2::sm80 {

// The state of a lane's rows g, g + 8, ...: the sum of P V is in accumulators beside it.
template <int kRows>
struct RowStates {
  static constexpr int kCount = kRows / 8;  // of a lane
  // m of a row that has seen nothing. Finite, so that -inf - m is -inf and not NaN.
  static constexpr float kLowest = -3.402823466e38f;

  float m[kCount];  // about the maximum of scale_log2 * S: P = 2^(scale_log2 S - m)
  float l[kCount];  // sum of P

  JF2_DEVICE void clear() {
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      m[r] = kLowest;
      l[r] = 0.f;
    }
  }
};

// Brings row r to another m.
template <int kRows, int kCols>
JF2_DEVICE void rescale(Accumulators<kRows, kCols>& o, RowStates<kRows>& state, int r, float m) {
  const float factor = ptx::ex2(state.m[r] - m);
  state.m[r] = m;
  state.l[r] *= factor;
#pragma unroll
  for (int j = 0; j < kCols / 8; ++j) {
    at(o, r, j, 0) *= factor;
    at(o, r, j, 1) *= factor;
  }
}

// The log-sum-exp of row i, and what its O has to be multiplied with; -inf and 0 where the row sees
// nothing.
JF2_DEVICE float inverse_of(float l) { return l != 0.f ? 1.f / l : 0.f; }  // NaN is not 0
JF2_DEVICE void store_lse(const DecodeProblem& problem, const DecodePlan& plan,
                          const DecodeRows& rows, int i, float m, float l) {
  static_cast<float*>(problem.lse)[rows.lse_index(problem.shape, plan, i)] =
      l != 0.f ? log_sum_exp(m, l) : -INFINITY;
}

// The results of rows that have seen all their keys. The accumulators begin at `col`.
template <typename Element, int kRows, int kCols>
JF2_DEVICE void store_results(const DecodeProblem& problem, const DecodePlan& plan,
                              const DecodeRows& rows, Accumulators<kRows, kCols>& o,
                              const RowStates<kRows>& state, int col, int thread) {
  const Shape& shape = problem.shape;
  const int lane = thread % 32;
#pragma unroll
  for (int r = 0; r < RowStates<kRows>::kCount; ++r) {
    const int i = r * 8 + (lane >> 2);
    if (i >= rows.count) continue;
    const float inverse = inverse_of(state.l[r]);
    Element* const out =
        static_cast<Element*>(problem.out) + rows.index(shape, plan, i) * shape.value_dim;
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      const int c = col + j * 8 + (lane & 3) * 2;
      if (c >= shape.value_dim) continue;
      const float x = at(o, r, j, 0) * inverse, y = at(o, r, j, 1) * inverse;
      if constexpr (sizeof(Element) == 4) {
        *reinterpret_cast<float2*>(out + c) = make_float2(x, y);
      } else {
        *reinterpret_cast<uint32_t*>(out + c) = pack2<Element>(x, y);
      }
    }
    if (thread < 32 && lane % 4 == 0) store_lse(problem, plan, rows, i, state.m[r], state.l[r]);
  }
}

// Four columns of a result.
template <typename Element>
JF2_DEVICE void store_quad(Element* out, float4 x) {
  if constexpr (sizeof(Element) == 4) {
    *reinterpret_cast<float4*>(out) = x;
  } else {
    *reinterpret_cast<uint2*>(out) = make_uint2(pack2<Element>(x.x, x.y), pack2<Element>(x.z, x.w));
  }
}

// What the block of a part leaves.
struct Piece {
  uint64_t* flag;
  float4* states;  // [rows]: m, l and two that are not used
  float* out;      // [rows, Hv]

  JF2_DEVICE static int64_t floats(const DecodeProblem& problem, const DecodePlan& plan) {
    return decode_piece_floats(min(plan.rows, kDecodeRows), problem.shape.value_dim);
  }
  JF2_DEVICE Piece(const DecodeProblem& problem, const DecodePlan& plan, unsigned part) {
    const int rows = min(plan.rows, kDecodeRows);
    float* const piece = problem.pieces + part * floats(problem, plan);
    flag = reinterpret_cast<uint64_t*>(piece);
    states = reinterpret_cast<float4*>(piece + 4);
    out = piece + 4 + 4 * rows;
  }
};

template <int kRows, int kCols>
JF2_DEVICE void leave_piece(const DecodeProblem& problem, const DecodePlan& plan, unsigned part,
                            Accumulators<kRows, kCols>& o, const RowStates<kRows>& state, int rows,
                            int col, int thread) {
  const Piece piece(problem, plan, part);
  const int lane = thread % 32, value_dim = problem.shape.value_dim;
#pragma unroll
  for (int r = 0; r < RowStates<kRows>::kCount; ++r) {
    const int i = r * 8 + (lane >> 2);
    if (i >= rows) continue;
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      const int c = col + j * 8 + (lane & 3) * 2;
      if (c >= value_dim) continue;
      *reinterpret_cast<float2*>(piece.out + i * value_dim + c) =
          make_float2(at(o, r, j, 0), at(o, r, j, 1));
    }
    if (thread < 32 && lane % 4 == 0)
      *reinterpret_cast<float2*>(piece.states + i) = make_float2(state.m[r], state.l[r]);
  }
  ptx::barrier_sync(1, kDecodeWarps * 32);  // every thread's stores come before the flag
  if (thread == 0) ptx::st_release(piece.flag, plan.number);
}

JF2_DEVICE float warp_max(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}
JF2_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// The results of a block's rows: its own O, m and l in shared memory, and the pieces of the parts
// after its own up to `last`, in this order. They are far away, so that little of this may wait for
// anything else: a warp takes 128 columns of a row, four a lane, and 32 pieces at a time, of which
// each lane knows one's m and l.
template <typename Config>
JF2_DEVICE void merge_pieces(const DecodeShared<Config>& shared, const DecodeProblem& problem,
                             const DecodePlan& plan, const DecodeRows& rows, const DecodePart& own,
                             unsigned last, int thread) {
  using Element = typename Config::Element;
  constexpr int kThreads = kDecodeWarps * 32, kAtOnce = 16;
  for (unsigned part = own.index + 1 + thread; part <= last; part += kThreads) {
    uint64_t* const flag = Piece(problem, plan, own.piece(plan, part)).flag;
    while (ptx::ld_acquire(flag) != plan.number) {
    }
    *flag = 0;
  }
  ptx::barrier_sync(1, kThreads);  // all pieces are there

  constexpr int kSpan = 128, kSpans = (Config::kHeadDim + kSpan - 1) / kSpan;
  const int warp = thread / 32, lane = thread % 32, value_dim = problem.shape.value_dim;
  for (int task = warp; task < rows.count * kSpans; task += kDecodeWarps) {
    const int i = task / kSpans, c = task % kSpans * kSpan + lane * 4;
    const bool inside = c < value_dim;
    const float2 state = ptx::lds_f32x2(shared.states() + i * 8);
    float m = state.x, l = state.y;
    const int col = inside ? c : 0;
    float4 o = ptx::lds_f32x4(shared.o().address(i, col));
    for (unsigned first = own.index + 1; first <= last; first += 32) {
      const int count = min(32, int(last + 1 - first));
      const Piece piece(problem, plan, own.piece(plan, first));
      const int64_t step = Piece::floats(problem, plan) * plan.lanes.d;  // to the next part's
      const float* state_at = reinterpret_cast<const float*>(piece.states + i);
      const float2 s =
          __ldcg(reinterpret_cast<const float2*>(state_at + min(lane, count - 1) * step));
      const float* at = piece.out + i * value_dim + col;
      float weight = 0.f;
#pragma unroll 1
      for (int begin = 0; begin < count; begin += kAtOnce) {
        float4 x[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          x[k] = __ldcg(reinterpret_cast<const float4*>(at));
          if (begin + k + 1 < count) at += step;  // else once more the last
        }
        if (begin == 0) {
          const float before = m;
          m = fmaxf(m, warp_max(s.x));
          const float factor = ptx::ex2(before - m);
          o = make_float4(o.x * factor, o.y * factor, o.z * factor, o.w * factor);
          weight = ptx::ex2(s.x - m);
          l = l * factor + warp_sum(lane < count ? s.y * weight : 0.f);
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const float w = __shfl_sync(~0u, weight, begin + k);
          if (begin + k < count) {
            o = make_float4(fmaf(x[k].x, w, o.x), fmaf(x[k].y, w, o.y), fmaf(x[k].z, w, o.z),
                            fmaf(x[k].w, w, o.w));
          }
        }
      }
    }
    if (lane == 0 && c == 0) store_lse(problem, plan, rows, i, m, l);
    if (!inside) continue;
    const float inverse = inverse_of(l);
    store_quad(
        static_cast<Element*>(problem.out) + rows.index(problem.shape, plan, i) * value_dim + c,
        make_float4(o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse));
  }
}

}  // namespace jax_flash2::sm80
