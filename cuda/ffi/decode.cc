#include "ffi/decode.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

namespace jax_flash2::ffi {
namespace {

using xla::ffi::DataType;
using Dims = std::vector<int64_t>;

std::string dtype_name(DataType dtype) {
  switch (dtype) {
    case DataType::F16:
      return "float16";
    case DataType::BF16:
      return "bfloat16";
    case DataType::F32:
      return "float32";
    case DataType::F64:
      return "float64";
    case DataType::S32:
      return "int32";
    default:
      return "dtype " + std::to_string(static_cast<int>(dtype));
  }
}

std::string describe(DataType dtype, const Dims& dims) {
  std::string text = dtype_name(dtype) + "[";
  for (size_t i = 0; i < dims.size(); ++i) {
    if (i > 0) text += ",";
    text += std::to_string(dims[i]);
  }
  return text + "]";
}

Dims dims_of(const AnyBuffer& buffer) {
  return Dims(buffer.dimensions().begin(), buffer.dimensions().end());
}

std::string describe(const AnyBuffer& buffer) {
  return describe(buffer.element_type(), dims_of(buffer));
}

Status wrong(std::string_view name, const std::string& expected, const std::string& got) {
  return Status::invalid_argument("jax_flash2: " + std::string(name) + " should be " + expected +
                                  ", got " + got);
}

struct Expectation {
  const char* name;
  const AnyBuffer& buffer;
  DataType dtype;
  Dims tail;  // the shape after the batch axes
};

Status check_all(const Dims& batch_axes, std::initializer_list<Expectation> expectations) {
  for (const Expectation& e : expectations) {
    Dims dims = batch_axes;
    dims.insert(dims.end(), e.tail.begin(), e.tail.end());
    if (e.buffer.element_type() != e.dtype || dims_of(e.buffer) != dims) {
      return wrong(e.name, describe(e.dtype, dims), describe(e.buffer));
    }
  }
  return {};
}

Status check_range(std::string_view name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return {};
  return wrong(name, "in [" + std::to_string(low) + ", " + std::to_string(high) + "]",
               std::to_string(value));
}

Status check_head_dim(std::string_view name, int64_t value) {
  if (value >= 8 && value <= kMaxHeadDim && value % 8 == 0) return {};
  return wrong(name, "a multiple of 8 in [8, " + std::to_string(kMaxHeadDim) + "]",
               std::to_string(value));
}

// What q, k and v say about the call; every other buffer is held against it.
struct Call {
  Dims batch_axes;
  Shape shape;
  DType dtype;
  DataType data_type;   // of q, k, v, out and their gradients
  DataType stats_type;  // of lse and delta
};

Status decode_dtype(const AnyBuffer& q, Call& call) {
  call.data_type = q.element_type();
  call.stats_type = DataType::F32;
  switch (call.data_type) {
    case DataType::F16:
      call.dtype = DType::kFloat16;
      return {};
    case DataType::BF16:
      call.dtype = DType::kBFloat16;
      return {};
    case DataType::F32:
      call.dtype = DType::kFloat32;
      return {};
    case DataType::F64:
      call.dtype = DType::kFloat64;
      call.stats_type = DataType::F64;
      return {};
    default:
      return wrong("q", "float16, bfloat16, float32 or float64", describe(q));
  }
}

// Checks the numbers and fills `call`; `k` and `v` are the axes [S, K, H] and [S, K, Hv].
Status decode_shape(const Dims& q, const Dims& k, const Dims& v, Call& call) {
  const size_t rank = q.size();
  const int64_t query_len = q[rank - 3], query_heads = q[rank - 2], head_dim = q[rank - 1];
  const int64_t kv_len = k[0], kv_heads = k[1], value_dim = v[2];
  const int64_t max_int = std::numeric_limits<int32_t>::max();
  if (Status s = check_range("the query length T", query_len, 0, kMaxLength); !s.ok()) return s;
  if (Status s = check_range("the key length S", kv_len, 0, kMaxLength); !s.ok()) return s;
  if (Status s = check_range("the query heads N", query_heads, 1, max_int); !s.ok()) return s;
  if (Status s = check_range("the key heads K", kv_heads, 1, max_int); !s.ok()) return s;
  if (Status s = check_head_dim("the head dim H", head_dim); !s.ok()) return s;
  if (Status s = check_head_dim("the head dim Hv", value_dim); !s.ok()) return s;
  if (query_heads % kv_heads != 0) {
    return wrong("the query heads N", "a multiple of the key heads K = " + std::to_string(kv_heads),
                 std::to_string(query_heads));
  }

  call.batch_axes = Dims(q.begin(), q.end() - 3);
  call.shape = {.batch = 1,
                .query_len = static_cast<int>(query_len),
                .kv_len = static_cast<int>(kv_len),
                .query_heads = static_cast<int>(query_heads),
                .kv_heads = static_cast<int>(kv_heads),
                .head_dim = static_cast<int>(head_dim),
                .value_dim = static_cast<int>(value_dim)};
  for (int64_t axis : call.batch_axes) call.shape.batch *= axis;
  return {};
}

Status decode_call(const AnyBuffer& q, const AnyBuffer& k, const AnyBuffer& v, Call& call) {
  if (Status s = decode_dtype(q, call); !s.ok()) return s;
  const Dims q_dims = dims_of(q), k_dims = dims_of(k), v_dims = dims_of(v);
  const size_t rank = q_dims.size();
  if (rank < 3) return wrong("q", "[*B, T, N, H]", describe(q));
  const std::string same_rank = "of rank " + std::to_string(rank) + " as q is";
  if (k_dims.size() != rank) return wrong("k", same_rank, describe(k));
  if (v_dims.size() != rank) return wrong("v", same_rank, describe(v));
  const Dims k_tail(k_dims.end() - 3, k_dims.end()), v_tail(v_dims.end() - 3, v_dims.end());
  if (Status s = decode_shape(q_dims, k_tail, v_tail, call); !s.ok()) return s;
  const int64_t S = k_tail[0], K = k_tail[1];
  return check_all(call.batch_axes, {{"k", k, call.data_type, {S, K, call.shape.head_dim}},
                                     {"v", v, call.data_type, {S, K, call.shape.value_dim}}});
}

// The same for k and v in pages, [pages, page size, K, H] and [pages, page size, K, Hv].
Status decode_paged_call(const AnyBuffer& q, const AnyBuffer& k, const AnyBuffer& v,
                         const AnyBuffer& table, Call& call, Pages& pages) {
  if (Status s = decode_dtype(q, call); !s.ok()) return s;
  const Dims q_dims = dims_of(q), k_dims = dims_of(k), v_dims = dims_of(v);
  const Dims table_dims = dims_of(table);
  if (q_dims.size() < 3) return wrong("q", "[*B, T, N, H]", describe(q));
  if (k_dims.size() != 4) return wrong("k", "[pages, page size, K, H]", describe(k));
  if (v_dims.size() != 4) return wrong("v", "[pages, page size, K, Hv]", describe(v));
  if (table_dims.empty()) return wrong("page_table", "[*B, P]", describe(table));
  const int64_t count = k_dims[0], size = k_dims[1], K = k_dims[2], P = table_dims.back();
  if (Status s = check_range("the pages", count, 0, kMaxLength); !s.ok()) return s;
  if (Status s = check_range("the page size", size, kPageMultiple, kMaxLength); !s.ok()) return s;
  if (size % kPageMultiple != 0) {
    return wrong("the page size", "a multiple of " + std::to_string(kPageMultiple),
                 std::to_string(size));
  }
  if (Status s = check_range("the pages of a sequence P", P, 0, kMaxLength); !s.ok()) return s;
  if (Status s = decode_shape(q_dims, {P * size, K, k_dims[3]}, {P * size, K, v_dims[3]}, call);
      !s.ok()) {
    return s;
  }
  pages = {.table = static_cast<const int32_t*>(table.untyped_data()),
           .per_sequence = static_cast<int>(P),
           .size = static_cast<int>(size),
           .count = static_cast<int>(count)};
  if (Status s = check_all({}, {{"k", k, call.data_type, {count, size, K, call.shape.head_dim}},
                                {"v", v, call.data_type, {count, size, K, call.shape.value_dim}}});
      !s.ok()) {
    return s;
  }
  return check_all(call.batch_axes, {{"page_table", table, DataType::S32, {P}}});
}

Status decode_precision(std::string_view text, Precision& precision) {
  if (text == "default") return precision = Precision::kDefault, Status();
  if (text == "high") return precision = Precision::kHigh, Status();
  if (text == "highest") return precision = Precision::kHighest, Status();
  return wrong("precision", "default, high or highest", std::string(text));
}

Status decode_mode(std::string_view text, BackwardMode& mode) {
  for (BackwardMode named :
       {BackwardMode::kFused, BackwardMode::kDeterministic, BackwardMode::kSplit}) {
    if (text == name_of(named)) return mode = named, Status();
  }
  return wrong("backward", "fused, deterministic or split", std::string(text));
}

Status decode_family(std::string_view text, Family& family) {
  if (text == "auto") return family = Family::kAuto, Status();
  if (text == "sm80") return family = Family::kSm80, Status();
  return wrong("family", "auto or sm80", std::string(text));
}

Status decode_scale(double value, double& scale) {
  if (value > 0 && std::isfinite(value)) return scale = value, Status();
  return wrong("scale", "positive and finite", std::to_string(value));
}

// What the attributes say to forward and backward alike.
template <class Problem>
Status decode_shared(const AttentionSpec& spec, Problem& problem) {
  if (Status s = decode_scale(spec.scale, problem.scale); !s.ok()) return s;
  const auto edge = [](int64_t x) {
    return static_cast<int>(std::clamp<int64_t>(x, -kUnbounded, kUnbounded));
  };
  problem.band = {
      .lower = edge(spec.band_lower), .upper = edge(spec.band_upper), .bounds = nullptr};
  if (Status s = decode_precision(spec.precision, problem.precision); !s.ok()) return s;
  return decode_family(spec.family, problem.family);
}

Status decode_bounds(const Call& call, const std::optional<AnyBuffer>& bounds, BandSpec& band) {
  if (!bounds) return {};
  band.bounds = static_cast<const Bounds*>(bounds->untyped_data());
  return check_all(call.batch_axes, {{"bounds", *bounds, DataType::S32, {3}}});
}

}  // namespace

Status decode(std::string_view name, DType& dtype) {
  if (name == "float16") return dtype = DType::kFloat16, Status();
  if (name == "bfloat16") return dtype = DType::kBFloat16, Status();
  if (name == "float32") return dtype = DType::kFloat32, Status();
  if (name == "float64") return dtype = DType::kFloat64, Status();
  return wrong("dtype", "float16, bfloat16, float32 or float64", std::string(name));
}

Status decode(const AttentionSpec& spec, ForwardProblem& problem) {
  return decode_shared(spec, problem);
}

Status decode(const AttentionSpec& spec, BackwardProblem& problem) {
  if (Status s = decode_mode(spec.backward, problem.mode); !s.ok()) return s;
  return decode_shared(spec, problem);
}

Status decode(const ForwardBuffers& b, const AttentionSpec& spec, ForwardProblem& problem) {
  Call call;
  if (Status s = decode_call(b.q, b.k, b.v, call); !s.ok()) return s;
  const Shape& shape = call.shape;
  const int64_t T = shape.query_len, N = shape.query_heads;
  problem = {};
  problem.shape = shape;
  problem.dtype = call.dtype;
  problem.q = b.q.untyped_data();
  problem.k = b.k.untyped_data();
  problem.v = b.v.untyped_data();
  problem.out = b.out.untyped_data();
  problem.lse = b.lse.untyped_data();
  problem.next_tile = static_cast<int32_t*>(b.next_tile.untyped_data());
  if (Status s = decode(spec, problem); !s.ok()) return s;
  if (Status s = decode_bounds(call, b.bounds, problem.band); !s.ok()) return s;
  return check_all(call.batch_axes, {{"out", b.out, call.data_type, {T, N, shape.value_dim}},
                                     {"lse", b.lse, call.stats_type, {N, T}},
                                     {"next_tile", b.next_tile, DataType::S32, {1}}});
}

Status decode(const BackwardBuffers& b, const AttentionSpec& spec, BackwardProblem& problem) {
  Call call;
  if (Status s = decode_call(b.q, b.k, b.v, call); !s.ok()) return s;
  const Shape& shape = call.shape;
  problem = {};
  problem.shape = shape;
  problem.dtype = call.dtype;
  problem.q = b.q.untyped_data();
  problem.k = b.k.untyped_data();
  problem.v = b.v.untyped_data();
  problem.out = b.out.untyped_data();
  problem.lse = b.lse.untyped_data();
  problem.dout = b.dout.untyped_data();
  problem.dlse = b.dlse.untyped_data();
  problem.dq = b.dq.untyped_data();
  problem.dk = b.dk.untyped_data();
  problem.dv = b.dv.untyped_data();
  problem.row_stats = b.row_stats.untyped_data();
  problem.queues = static_cast<int32_t*>(b.queues.untyped_data());
  if (Status s = decode(spec, problem); !s.ok()) return s;
  if (Status s = decode_bounds(call, b.bounds, problem.band); !s.ok()) return s;

  const bool accumulates = problem.mode != BackwardMode::kSplit;
  if (accumulates) {
    problem.dq_accum = b.dq_accum.untyped_data();
    problem.semaphores = static_cast<int32_t*>(b.semaphores.untyped_data());
  }

  const DataType data = call.data_type, stats = call.stats_type;
  const int64_t T = shape.query_len, N = shape.query_heads, S = shape.kv_len, K = shape.kv_heads;
  const int64_t H = shape.head_dim, Hv = shape.value_dim;
  const int64_t Tp = round_up(T, kTokenTile), Hp = accumulates ? round_up(H, kHeadDimTile) : 0;
  const int64_t turns = accumulates ? Tp / kSemaphoreRows : 0;
  // The buffer says into how many parts: a call that was batched after group_splits() chose has more
  // sequences than it knew of.
  const Dims partial = dims_of(b.dkv_partial);
  const size_t axis = call.batch_axes.size();
  const int64_t splits = axis < partial.size() ? partial[axis] : 0;
  if (splits > 0) {
    if (shape.group() % splits != 0) {
      return wrong(
          "dkv_partial",
          "of a divisor of N / K = " + std::to_string(shape.group()) + " parts, or of none",
          describe(b.dkv_partial));
    }
    problem.dkv_partial = static_cast<float*>(b.dkv_partial.untyped_data());
  }
  problem.group_splits = static_cast<int>(std::max<int64_t>(splits, 1));
  return check_all(call.batch_axes,
                   {{"out", b.out, data, {T, N, Hv}},
                    {"lse", b.lse, stats, {N, T}},
                    {"dout", b.dout, data, {T, N, Hv}},
                    {"dlse", b.dlse, stats, {N, T}},
                    {"dq", b.dq, data, {T, N, H}},
                    {"dk", b.dk, data, {S, K, H}},
                    {"dv", b.dv, data, {S, K, Hv}},
                    {"row_stats", b.row_stats, stats, {N, kRowStats, Tp}},
                    {"dq_accum", b.dq_accum, DataType::F32, {N, Tp, Hp}},
                    {"semaphores", b.semaphores, DataType::S32, {N, turns}},
                    {"dkv_partial", b.dkv_partial, DataType::F32, {splits, S, K, H + Hv}},
                    {"queues", b.queues, DataType::S32, {kQueues}}});
}

Status decode(const DecodeBuffers& b, const DecodeSpec& spec, DecodeProblem& problem) {
  Call call;
  problem = {};
  if (Status s = b.page_table ? decode_paged_call(b.q, b.k, b.v, *b.page_table, call, problem.pages)
                              : decode_call(b.q, b.k, b.v, call);
      !s.ok()) {
    return s;
  }
  const Shape& shape = call.shape;
  problem.shape = shape;
  problem.dtype = call.dtype;
  problem.lengths = static_cast<const int32_t*>(b.lengths.untyped_data());
  problem.q = b.q.untyped_data();
  problem.k = b.k.untyped_data();
  problem.v = b.v.untyped_data();
  problem.out = b.out.untyped_data();
  problem.lse = b.lse.untyped_data();
  problem.pieces = static_cast<float*>(b.pieces.untyped_data());
  if (Status s = decode_scale(spec.scale, problem.scale); !s.ok()) return s;
  if (spec.window_left < 0) {
    return wrong("window_left", "at least 0", std::to_string(spec.window_left));
  }
  problem.window_left = static_cast<int>(std::min<int64_t>(spec.window_left, kUnbounded));
  const int64_t T = shape.query_len, N = shape.query_heads, Hv = shape.value_dim;
  const int64_t max_int = std::numeric_limits<int32_t>::max();
  if (Status s = check_range("T N / K", T * shape.group(), 0, max_int); !s.ok()) return s;
  // Wider where whoever made the buffer did not know T.
  const Dims pieces = dims_of(b.pieces);
  const int piece = decode_piece_floats(std::min(problem.rows(), kDecodeRows), shape.value_dim);
  if (b.pieces.element_type() != DataType::F32 || pieces.size() != 2 ||
      pieces[0] != kDecodeBlocks || pieces[1] < piece) {
    return wrong("pieces", describe(DataType::F32, {kDecodeBlocks, piece}) + " or wider",
                 describe(b.pieces));
  }
  return check_all(call.batch_axes, {{"lengths", b.lengths, DataType::S32, {}},
                                     {"out", b.out, call.data_type, {T, N, Hv}},
                                     {"lse", b.lse, call.stats_type, {N, T}}});
}

}  // namespace jax_flash2::ffi
