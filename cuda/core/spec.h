// The static half of a call: what jit has to retrace for. Floor 0: plain C++, no CUDA, no XLA.
//
// JAX_FLASH2_ATTENTION_SPEC and JAX_FLASH2_DECODE_SPEC are the one list of attributes of a pass. A
// list makes the struct here, the FFI decoder in ffi/spec_decoding.h and the list that the Python
// module exports, so that dataclass, struct and decoder cannot drift apart in name, order or type
// (tests/test_spec.py compares them).
#pragma once

#include <cstdint>
#include <string_view>

namespace jax_flash2 {

// X(C++ type, name). Python passes int as int64_t, float as double, str as std::string_view.
#define JAX_FLASH2_ATTENTION_SPEC(X)                                                  \
  X(double, scale)               /* multiplies the logits */                          \
  X(int64_t, band_lower)         /* query i sees key j only if j - i >= band_lower */ \
  X(int64_t, band_upper)         /* ... and j - i <= band_upper; see core/mask.h */   \
  X(std::string_view, precision) /* float32 products: "default", "high", "highest" */ \
  X(std::string_view, backward)  /* "fused", "deterministic", "split" */              \
  X(std::string_view, family)    /* CUDA kernels: "auto", the best for the device, or "sm80" */

#define JAX_FLASH2_DECODE_SPEC(X)                     \
  X(double, scale)        /* multiplies the logits */ \
  X(int64_t, window_left) /* query i sees key j only if j >= i - window_left, both as positions */

#define JAX_FLASH2_MEMBER(type, name) type name;
struct AttentionSpec {
  JAX_FLASH2_ATTENTION_SPEC(JAX_FLASH2_MEMBER)
};
struct DecodeSpec {
  JAX_FLASH2_DECODE_SPEC(JAX_FLASH2_MEMBER)
};
#undef JAX_FLASH2_MEMBER

}  // namespace jax_flash2
