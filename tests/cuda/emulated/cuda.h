// In place of the driver's header: tensor maps, with what the copy engine has to know of them.
#pragma once

#include "cuda_runtime.h"

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

// Of 16-bit elements, innermost dimension first.
struct alignas(64) CUtensorMap {
  char* data;
  int64_t sizes[4];
  int64_t strides[4];  // in bytes
  int64_t box[4];
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank,
                                       void* data, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* element_strides, CUtensorMapInterleave,
                                       CUtensorMapSwizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  bool valid = rank == 4 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && box[0] == 64;
  map->data = static_cast<char*>(data);
  for (int i = 0; i < 4; ++i) {
    map->sizes[i] = int64_t(sizes[i]);
    map->strides[i] = i == 0 ? 2 : int64_t(strides[i - 1]);
    map->box[i] = box[i];
    valid &= sizes[i] > 0 && box[i] > 0 && box[i] <= 256 && element_strides[i] == 1;
    valid &= i == 0 || map->strides[i] % 16 == 0;
  }
  return valid ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* found) {
  *entry = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
