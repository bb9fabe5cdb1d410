// AVX-512 with VNNI: a line is a register, four products a lane an instruction, any byte may be a level.
#include "tile_common.h"

#if defined(SGSC_SIMDE) || (defined(__x86_64__) && defined(__GNUC__))
#if defined(SGSC_SIMDE)
#include "simde_shims.h"
#else
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,prefer-vector-width=512")
#endif
#endif

namespace sgsc {
namespace {

struct V {
  using B = __m512i;
  using I = __m512i;
  using F = __m512;
  static constexpr int MOST = 16;
  static constexpr bool IN_PLACE = true;

  static B bytes(const void* p) { return _mm512_loadu_si512(p); }
  static I integers(const std::int32_t* p) { return _mm512_loadu_si512(p); }
  static F floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store(std::uint8_t* p, B v) { _mm512_storeu_si512(p, v); }
  static void store(std::int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static B no_bytes() { return _mm512_setzero_si512(); }
  static I zero() { return _mm512_setzero_si512(); }
  static F no_floats() { return _mm512_setzero_ps(); }
  static B spread(const std::int8_t* p) { return _mm512_set1_epi32(word(p)); }
  static B spread(const std::uint8_t* p) { return _mm512_set1_epi32(word(p)); }
  static F spread(const float* p) { return _mm512_set1_ps(*p); }
  template <int N>
  static B right(B v) {
    return _mm512_srli_epi32(v, N);
  }
  template <int N>
  static B left(B v) {
    return _mm512_slli_epi32(v, N);
  }
  template <int N>
  static I exactly_right(I v) {
    return _mm512_srai_epi32(v, N);
  }
  static B keep(B a, std::uint8_t m) { return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(m))); }
  static B join(B a, B b, std::uint8_t m) {
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi8(static_cast<char>(m)), 0xf8);  // a | (b & m)
  }
  static I plus(I a, I b) { return _mm512_add_epi32(a, b); }
  template <int BITS>
  static I dot(I sum, B levels, B x) {
#if defined(SGSC_SIMDE)
    return _mm512_dpbusd_epi32(sum, levels, x);
#else  // of the intrinsic, gcc copies the sums to and fro, and then has too few registers for them
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(levels), "v"(x));
    return sum;
#endif
  }
  // A level in the second byte of 2^15 is 2^15 + level: no conversion, and the offset comes with taking 2^15 away.
  static F offsets(const float* p) { return _mm512_sub_ps(_mm512_set1_ps(0x1p15f), floats(p)); }
  template <int BYTE>
  static F value(B quad, F less) {
    const B at = _mm512_add_epi32(_mm512_set4_epi32(12 << 8, 8 << 8, 4 << 8, 0), _mm512_set1_epi32(BYTE << 8));
    const B number =
        _mm512_mask_shuffle_epi8(_mm512_castps_si512(_mm512_set1_ps(0x1p15f)), 0x2222222222222222, quad, at);
    return _mm512_sub_ps(_mm512_castsi512_ps(number), less);
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static void prefetch(const std::uint8_t* p, int lines) {
    for (int i = 0; i < lines; ++i) _mm_prefetch(reinterpret_cast<const char*>(p + AHEAD + i * LINE), _MM_HINT_T0);
  }
};

#include "tile_kernels.inc"

}  // namespace

const TileKernels tile_kernels_avx512 = table;

}  // namespace sgsc

#if !defined(SGSC_SIMDE)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif
