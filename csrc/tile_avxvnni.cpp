// AVX2 with the 256-bit dot product of AVX-VNNI: any byte may be a level.
#include "tile_common.h"

#if defined(SGSC_SIMDE) || (defined(__x86_64__) && defined(__GNUC__))
#if defined(SGSC_SIMDE)
#include "simde_shims.h"
#else
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
#endif
#endif

namespace sgsc {
namespace {

template <int BITS>
__m256i dot256(__m256i sum, __m256i levels, __m256i x) {
  return _mm256_dpbusd_avx_epi32(sum, levels, x);
}

#define SGSC_DOT256 dot256
#define SGSC_IN_PLACE true
#include "tile_avx2.inc"
#include "tile_kernels.inc"

}  // namespace

const TileKernels tile_kernels_avxvnni = table;

}  // namespace sgsc

#if !defined(SGSC_SIMDE)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif
