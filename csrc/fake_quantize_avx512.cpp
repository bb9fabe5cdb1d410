// Headers first, target pragma after: no inline function shared with other files is then compiled for AVX-512.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fake_quantize.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif

namespace sgsc {
namespace {

constexpr int ROUND = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;  // half to even
constexpr std::int64_t RUN = 512;  // elements summed in float lanes before double takes over: 32 a lane
constexpr __mmask16 ALL = 0xffff;

// Sixteen elements as they lie in memory. Lanes outside the mask read as zero, and are not written.
__m512 load(__mmask16 here, const float* p) { return _mm512_maskz_loadu_ps(here, p); }
template <class T>
__m256i load(__mmask16 here, const T* p) {
  return _mm256_maskz_loadu_epi16(here, p);
}

template <bool STREAM>
void store(__mmask16 here, float* p, __m512 v) {
  STREAM ? _mm512_stream_ps(p, v) : _mm512_mask_storeu_ps(p, here, v);
}
template <bool STREAM, class T>
void store(__mmask16 here, T* p, __m256i v) {
  STREAM ? _mm256_stream_si256(reinterpret_cast<__m256i*>(p), v) : _mm256_mask_storeu_epi16(p, here, v);
}

__m512 keep(__mmask16 lanes, __m512 v) { return _mm512_maskz_mov_ps(lanes, v); }
__m256i keep(__mmask16 lanes, __m256i v) { return _mm256_maskz_mov_epi16(lanes, v); }

template <class T>
struct Lanes;  // of T, as float and back

template <>
struct Lanes<float> {
  static __m512 widen(__m512 v) { return v; }
  static __m512 narrow(__m512 v) { return v; }
};

template <>
struct Lanes<Float16> {
  static __m512 widen(__m256i v) { return _mm512_cvtph_ps(v); }
  static __m256i narrow(__m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

// The high half of each lane is the number, so one shuffle of halves does it.
template <>
struct Lanes<Bfloat16> {
  static __m512 widen(__m256i v) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i halves = _mm512_castsi256_si512(v);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_slli_epi32(lane, 16), halves));
  }
  static __m256i narrow(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v), half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i even = _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
    const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
    const __m512i sound = _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7fc00000), number, even);
    const __m512i lane = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1f001d, 0x1b0019, 0x170015, 0x130011, 0xf000d,
                                          0xb0009, 0x70005, 0x30001);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(lane, sound));
  }
};

// f(i, lanes that hold an element, whether to stream) for every sixteen of n; g() after at most RUN of them.
template <bool STREAM, class T, class F, class G>
void for_each_sixteen(const T* out, std::int64_t n, const F& f, const G& g) {
  std::int64_t i = 0;
  const auto some = [&](std::int64_t end) {
    while (i < end) {
      const std::int64_t stop = std::min(i + RUN, end);
      for (; i + 16 <= stop; i += 16) f(i, ALL, std::false_type{});
      if (i < stop) f(i, static_cast<__mmask16>((1u << (stop - i)) - 1), std::false_type{});
      i = stop;
      g();
    }
  };
  if (STREAM) {
    some(to_line(out, n));
    for (; i + RUN <= n; g())
      for (const std::int64_t stop = i + RUN; i < stop; i += 16) f(i, ALL, std::true_type{});
  }
  some(n);
}

struct Vectors {
  __m512 scale, lo, hi, shift;
  explicit Vectors(const Grid& g)
      : scale(_mm512_set1_ps(static_cast<float>(g.scale))),
        lo(_mm512_set1_ps(static_cast<float>(g.lo))),
        hi(_mm512_set1_ps(static_cast<float>(g.hi))),
        shift(_mm512_set1_ps(static_cast<float>(g.shift))) {}

  __m512 real_code(__m512 x) const { return _mm512_sub_ps(_mm512_div_ps(x, scale), shift); }
  // max and min return their second operand where one is NaN: v, so a NaN stays
  __m512 code(__m512 v) const { return _mm512_roundscale_ps(_mm512_min_ps(hi, _mm512_max_ps(lo, v)), ROUND); }
};

template <class T, bool STREAM>
void forward(const void* x, const Grid& grid, void* q, std::int64_t n) {
  const T* in = static_cast<const T*>(x);
  T* out = static_cast<T*>(q);
  const Vectors g(grid);
  const auto sixteen = [&](std::int64_t i, __mmask16 here, auto streamed) {
    const __m512 code = g.code(g.real_code(Lanes<T>::widen(load(here, in + i))));
    const __m512 value = _mm512_mul_ps(_mm512_add_ps(code, g.shift), g.scale);
    store<streamed>(here, out + i, Lanes<T>::narrow(value));
  };
  for_each_sixteen<STREAM>(out, n, sixteen, [] {});
}

template <class T, bool STREAM, bool MIXED>
void backward(const void* grad, const void* x, const Grid& grid, void* grad_x, std::int64_t n, Sums& sums) {
  const T *in = static_cast<const T*>(x), *up = static_cast<const T*>(grad);
  T* out = static_cast<T*>(grad_x);
  const Vectors g(grid);
  __m512 by_scale = _mm512_setzero_ps(), by_lo = by_scale, by_hi = by_scale, by_x = by_scale;
  const auto sixteen = [&](std::int64_t i, __mmask16 here, auto streamed) {
    const auto unchanged = load(here, up + i);
    const __m512 given = Lanes<T>::widen(load(here, in + i)), v = g.real_code(given), code = g.code(v);
    const __m512 d = Lanes<T>::widen(unchanged);
    const __mmask16 below = _mm512_cmp_ps_mask(v, g.lo, _CMP_LT_OQ), above = _mm512_cmp_ps_mask(v, g.hi, _CMP_GT_OQ);
    const __mmask16 outside = below | above, within = static_cast<__mmask16>(~outside);
    const __m512 slope = _mm512_mask_add_ps(_mm512_sub_ps(code, v), outside, code, g.shift);
    // `here`: on a grid whose scale is 0 or infinite, the other lanes may turn into NaN
    by_scale = _mm512_mask_add_ps(by_scale, here, by_scale, _mm512_mul_ps(d, slope));
    by_lo = _mm512_mask_add_ps(by_lo, below, by_lo, d);
    by_hi = _mm512_mask_add_ps(by_hi, above, by_hi, d);
    if constexpr (MIXED) by_x = _mm512_mask_add_ps(by_x, within, by_x, _mm512_mul_ps(d, given));
    store<streamed>(here, out + i, keep(within, unchanged));
  };
  const auto total = [](__m512& lanes) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(lanes));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(lanes, 1));
    lanes = _mm512_setzero_ps();
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  };
  for_each_sixteen<STREAM>(out, n, sixteen, [&] {
    sums.scale += total(by_scale);
    sums.lo += grid.scale * total(by_lo);
    sums.hi += grid.scale * total(by_hi);
    if constexpr (MIXED) sums.inside += total(by_x);
  });
}

template <bool STREAM>
GridKernels kernels(Type type) {
  if (type == Type::bf16)
    return {forward<Bfloat16, STREAM>, backward<Bfloat16, STREAM, false>, backward<Bfloat16, STREAM, true>};
  if (type == Type::f16)
    return {forward<Float16, STREAM>, backward<Float16, STREAM, false>, backward<Float16, STREAM, true>};
  return {forward<float, STREAM>, backward<float, STREAM, false>, backward<float, STREAM, true>};
}

}  // namespace

GridKernels grid_kernels_avx512(Type type, bool stream) { return stream ? kernels<true>(type) : kernels<false>(type); }

}  // namespace sgsc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
