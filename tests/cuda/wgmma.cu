// Every wgmma wrapper against a plain product: shapes, element types, operand sources, transposes and the
// 128-byte swizzle. Run by tests/test_wgmma.py on a GPU of compute capability 9.0.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "device/math.cuh"
#include "device/smem_sm90.cuh"

using namespace jax_flash2;

constexpr int kK = 128;  // two panels of k-major columns

enum class Source { kSharedKMajor, kSharedOuterMajor, kRegisters };

template <int kN, typename Element, Source kA, bool kOuterMajorB>
__global__ void product(const Element* a, const Element* b, float* d) {  // a [64, kK], b [kN, kK]
  extern __shared__ uint8_t shared[];
  const uint32_t base = (ptx::shared_address(shared) + 1023) & ~1023u;
  const PanelTile<64, kK> a_rows{base};
  const PanelTile<kK, 64> a_columns{base};
  const PanelTile<kN, kK> b_rows{base + 32768};
  const PanelTile<kK, kN> b_columns{base + 32768};
  const int thread = threadIdx.x;
  auto put = [](uint32_t address, Element x) {
    asm volatile("st.shared.b16 [%0], %1;\n" ::"r"(address), "h"(*reinterpret_cast<uint16_t*>(&x)));
  };
  for (int i = thread; i < 64 * kK; i += 128) {
    const int m = i / kK, k = i % kK;
    put(kA == Source::kSharedOuterMajor ? a_columns.address(k, m) : a_rows.address(m, k), a[i]);
  }
  for (int i = thread; i < kN * kK; i += 128) {
    const int n = i / kK, k = i % kK;
    put(kOuterMajorB ? b_columns.address(k, n) : b_rows.address(n, k), b[i]);
  }
  ptx::fence_proxy_async();
  __syncthreads();

  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  float acc[kN / 2];
  for (float& x : acc) x = NAN;  // the first product must overwrite
  uint32_t fragments[kK / 16][4];
#pragma unroll
  for (int k = 0; k < kK; k += 16)
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + g + (i & 1) * 8, column = k + t * 2 + (i >> 1) * 8;
      fragments[k / 16][i] = *reinterpret_cast<const uint32_t*>(&a[row * kK + column]);
    }
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kK; k += 16) {
    const uint32_t b_at = kOuterMajorB ? b_columns.outer_major() + b_columns.outer_major_offset(k)
                                       : b_rows.k_major() + b_rows.k_major_offset(0, k);
    using Mma = ptx::Wgmma<kN, Element>;
    if constexpr (kA == Source::kRegisters) {
      Mma::template rs<kOuterMajorB>(acc, fragments[k / 16], b_at, k > 0);
    } else if constexpr (kA == Source::kSharedOuterMajor) {
      Mma::template ss<true, kOuterMajorB>(
          acc, a_columns.outer_major() + a_columns.outer_major_offset(k), b_at, k > 0);
    } else {
      Mma::template ss<false, kOuterMajorB>(acc, a_rows.k_major() + a_rows.k_major_offset(0, k),
                                                b_at, k > 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    ptx::pin(acc[i]);
    const int row = warp * 16 + g + (i >> 1 & 1) * 8, column = i / 4 * 8 + t * 2 + (i & 1);
    d[row * kN + column] = acc[i];
  }
}

template <int kN, typename Element, Source kA, bool kOuterMajorB>
bool check(const char* type) {
  std::mt19937 random(kN);
  std::normal_distribution<float> normal;
  std::vector<Element> a(64 * kK), b(kN * kK);
  for (Element& x : a) x = Element(normal(random));
  for (Element& x : b) x = Element(normal(random));
  Element *da, *db;
  float* dd;
  cudaMalloc(&da, a.size() * 2);
  cudaMalloc(&db, b.size() * 2);
  cudaMalloc(&dd, 64 * kN * 4);
  cudaMemcpy(da, a.data(), a.size() * 2, cudaMemcpyHostToDevice);
  cudaMemcpy(db, b.data(), b.size() * 2, cudaMemcpyHostToDevice);
  auto* kernel = product<kN, Element, kA, kOuterMajorB>;
  constexpr int kBytes = 32768 + 256 * kK * 2 + 1024;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  kernel<<<1, 128, kBytes>>>(da, db, dd);
  std::vector<float> d(64 * kN);
  const cudaError_t error = cudaMemcpy(d.data(), dd, d.size() * 4, cudaMemcpyDeviceToHost);
  double worst = 0;
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < kN; ++n) {
      double sum = 0;
      for (int k = 0; k < kK; ++k) sum += double(float(a[m * kK + k])) * double(float(b[n * kK + k]));
      worst = std::fmax(worst, std::fabs(sum - d[m * kN + n]));
      if (std::isnan(d[m * kN + n])) worst = INFINITY;
    }
  cudaFree(da), cudaFree(db), cudaFree(dd);
  const bool ok = error == cudaSuccess && worst < 1e-3;
  if (!ok)
    std::printf("n %d %s source %d outer-major b %d: error %g %s\n", kN, type, int(kA), kOuterMajorB,
                worst, cudaGetErrorString(error));
  return ok;
}

int passed = 0, failed = 0;

template <int kN, typename Element>
void check_all(const char* type) {
  const bool results[] = {
      check<kN, Element, Source::kSharedKMajor, false>(type),
      check<kN, Element, Source::kSharedKMajor, true>(type),
      check<kN, Element, Source::kSharedOuterMajor, false>(type),
      check<kN, Element, Source::kSharedOuterMajor, true>(type),
      check<kN, Element, Source::kRegisters, false>(type),
      check<kN, Element, Source::kRegisters, true>(type),
  };
  for (bool ok : results) ++(ok ? passed : failed);
}

template <int... kN>
void check_widths() {
  (check_all<kN, __half>("float16"), ...);
  (check_all<kN, __nv_bfloat16>("bfloat16"), ...);
}

int main() {
  check_widths<32, 48, 64, 80, 96, 112, 128, 192, 256>();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
