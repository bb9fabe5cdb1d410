// AVX2: four products a lane are three instructions, and those of two levels of eight bits would not fit 16 bits.
#include "tile_common.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace sgsc {
namespace {

__m256i pairs(__m256i levels, __m256i x) {  // levels below 128: 2 * 127 * 127 < 2^15
  return _mm256_madd_epi16(_mm256_maddubs_epi16(levels, x), _mm256_set1_epi16(1));
}

template <int BITS>
__m256i dot256(__m256i sum, __m256i levels, __m256i x) {
  if (BITS < 8) return _mm256_add_epi32(sum, pairs(levels, x));
  const __m256i low = _mm256_and_si256(levels, _mm256_set1_epi8(127)),
                high = _mm256_andnot_si256(_mm256_set1_epi8(127), levels);
  const __m256i top = pairs(_mm256_srli_epi32(high, 1), x);  // 64 for each level of 128 and more
  return _mm256_add_epi32(_mm256_add_epi32(sum, pairs(low, x)), _mm256_add_epi32(top, top));
}

#define SGSC_DOT256 dot256
#define SGSC_IN_PLACE false
#include "tile_avx2.inc"
#include "tile_kernels.inc"

}  // namespace

const TileKernels tile_kernels_avx2 = table;

}  // namespace sgsc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
