// Tensor maps for the copy engine: encoded on the host for each call, passed to kernels by value.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "core/problem.h"
#include "launch/launch_util.h"

namespace jax_flash2::gpu {

// A dense [batch, rows, heads, cols] array of 16-bit elements, seen as boxes of `box_rows` rows x
// `box_heads` heads x 64 columns in the 128-byte swizzle. Reads past an end give zeros, writes are dropped.
struct TensorMapSpec {
  const void* data;
  DType dtype;
  int64_t batch;
  int rows, heads, cols;
  int box_rows, box_heads = 1;
};

// cuTensorMapEncodeTiled through the runtime: no link to libcuda, so that the module also loads
// where there is no driver.
inline Status encode_tensor_map(const TensorMapSpec& spec, CUtensorMap& map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    const bool ok = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (encode == nullptr)
    return Status::internal(
        "jax_flash2: this driver has no cuTensorMapEncodeTiled (needs CUDA 12)");
  const cuuint64_t cols = spec.cols, heads = spec.heads, rows = spec.rows;
  const cuuint64_t sizes[4] = {cols, heads, rows, static_cast<cuuint64_t>(spec.batch)};
  const cuuint64_t strides[3] = {cols * 2, heads * cols * 2, rows * heads * cols * 2};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(spec.box_heads),
                             static_cast<cuuint32_t>(spec.box_rows), 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map,
             spec.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             4, const_cast<void*>(spec.data), sizes, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return Status::internal("jax_flash2: cuTensorMapEncodeTiled failed with CUresult " +
                          std::to_string(static_cast<int>(result)));
}

}  // namespace jax_flash2::gpu
