// What both Python modules export.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string_view>
#include <type_traits>

#include "core/decode.h"
#include "core/problem.h"
#include "core/spec.h"
#include "ffi/handlers.h"

namespace jax_flash2::ffi {

template <class T>
constexpr const char* python_type() {
  if constexpr (std::is_same_v<T, double>) {
    return "float";
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return "int";
  } else {
    static_assert(std::is_same_v<T, std::string_view>, "no Python type for this attribute");
    return "str";
  }
}

template <class Backend>
void define_module(nanobind::module_& m) {
  namespace nb = nanobind;
#define JAX_FLASH2_MEMBER(type, name) members.append(nb::make_tuple(#name, python_type<type>()));
  m.def(
      "registrations",
      [] {
        nb::dict capsules;
        for (const Registration& r : Handlers<Backend>::registrations()) {
          capsules[r.target] = nb::capsule(reinterpret_cast<void*>(r.handler));
        }
        return capsules;
      },
      "The FFI handlers: {target name: capsule}, for jax.ffi.register_ffi_target.");
  m.def(
      "attention_spec",
      [] {
        nb::list members;
        JAX_FLASH2_ATTENTION_SPEC(JAX_FLASH2_MEMBER)
        return members;
      },
      "Attributes of a call, in order: [(name, type name)]; AttentionSpec in Python has the same.");
  m.def(
      "decode_spec",
      [] {
        nb::list members;
        JAX_FLASH2_DECODE_SPEC(JAX_FLASH2_MEMBER)
        return members;
      },
      "The same for a call that decodes; DecodeSpec in Python has the same.");
#undef JAX_FLASH2_MEMBER
  m.def(
      "ffi_api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "(major, minor) of the FFI headers this module was built with; jaxlib's must not be older.");
  m.def(
      "group_splits",
      [](int64_t batch, int query_len, int kv_len, int query_heads, int kv_heads) {
        return group_splits({.batch = batch,
                             .query_len = query_len,
                             .kv_len = kv_len,
                             .query_heads = query_heads,
                             .kv_heads = kv_heads,
                             .head_dim = 0,
                             .value_dim = 0});
      },
      nb::arg("batch"), nb::arg("query_len"), nb::arg("kv_len"), nb::arg("query_heads"),
      nb::arg("kv_heads"),
      "Parts of a group's query heads that the backward works on side by side.");
  m.def("decode_piece_floats", decode_piece_floats, nb::arg("rows"), nb::arg("value_dim"),
        "What a thread block that decodes may leave for another, in numbers of float32.");
  m.attr("TOKEN_TILE") = kTokenTile;
  m.attr("HEAD_DIM_TILE") = kHeadDimTile;
  m.attr("SEMAPHORE_ROWS") = kSemaphoreRows;
  m.attr("ROW_STATS") = int{kRowStats};
  m.attr("QUEUES") = int{kQueues};
  m.attr("MAX_HEAD_DIM") = kMaxHeadDim;
  m.attr("DECODE_BLOCKS") = kDecodeBlocks;
  m.attr("DECODE_ROWS") = kDecodeRows;
  m.attr("PAGE_MULTIPLE") = kPageMultiple;
}

}  // namespace jax_flash2::ffi
