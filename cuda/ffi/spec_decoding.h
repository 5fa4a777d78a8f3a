// Teaches XLA's FFI to decode the dict attribute `spec` into its struct, from the lists in
// core/spec.h. XLA fills a struct by position: struct, decoder and Python's list must share it.
#pragma once

#include "core/spec.h"
#include "xla/ffi/api/ffi.h"

// The list has to be expanded before XLA's macro counts its arguments, hence the second macro.
#define JAX_FLASH2_REGISTER(...) XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(__VA_ARGS__)
#define JAX_FLASH2_MEMBER(type, name) , ::xla::ffi::StructMember<type>(#name)

JAX_FLASH2_REGISTER(jax_flash2::AttentionSpec JAX_FLASH2_ATTENTION_SPEC(JAX_FLASH2_MEMBER));
JAX_FLASH2_REGISTER(jax_flash2::DecodeSpec JAX_FLASH2_DECODE_SPEC(JAX_FLASH2_MEMBER));

#undef JAX_FLASH2_MEMBER
#undef JAX_FLASH2_REGISTER
