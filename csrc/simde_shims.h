// Instruction sets emulated by SIMDe (github.com/simd-everywhere/simde), for tests: SGSC_SIMDE is defined, the flags of
// the sets are not. What its release 0.7.4 lacks is here. Include after tile_common.h.
#pragma once

#include <cstdint>

#define SIMDE_NO_INLINE  // calls: thousands of expansions would take minutes to compile
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#undef SGSC_LAMBDA
#define SGSC_LAMBDA

#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32(sum, levels, x) simde_mm256_dpbusd_epi32(sum, levels, x)

inline simde__m512i shifted_right(simde__m512i v, int n) {
  std::int32_t lanes[16];
  simde_mm512_storeu_si512(lanes, v);
  for (std::int32_t& lane : lanes) lane >>= n;
  return simde_mm512_loadu_si512(lanes);
}
#undef _mm512_srai_epi32
#define _mm512_srai_epi32(v, n) shifted_right(v, n)
