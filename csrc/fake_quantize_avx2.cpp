// Headers first, target pragma after: no inline function shared with other files is then compiled for AVX2.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fake_quantize.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace sgsc {
namespace {

constexpr int ROUND = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;  // half to even
constexpr std::int64_t RUN = 256;  // elements summed in float lanes before double takes over: 32 a lane

__m256 load(const float* p) { return _mm256_loadu_ps(p); }
template <bool STREAM>
void store(float* p, __m256 v) {
  STREAM ? _mm256_stream_ps(p, v) : _mm256_storeu_ps(p, v);
}

template <bool STREAM>
void store_half(void* p, __m128i v) {
  STREAM ? _mm_stream_si128(static_cast<__m128i*>(p), v) : _mm_storeu_si128(static_cast<__m128i*>(p), v);
}

__m256 load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
template <bool STREAM>
void store(Float16* p, __m256 v) {
  store_half<STREAM>(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

__m256 load(const Bfloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
template <bool STREAM>
void store(Bfloat16* p, __m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i wide = _mm256_blendv_epi8(_mm256_srli_epi32(even, 16), _mm256_set1_epi32(0x7fc0), is_nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x08);
  store_half<STREAM>(p, _mm256_castsi256_si128(packed));
}

struct Vectors {
  __m256 scale, lo, hi, shift;
  explicit Vectors(const Grid& g)
      : scale(_mm256_set1_ps(static_cast<float>(g.scale))),
        lo(_mm256_set1_ps(static_cast<float>(g.lo))),
        hi(_mm256_set1_ps(static_cast<float>(g.hi))),
        shift(_mm256_set1_ps(static_cast<float>(g.shift))) {}

  __m256 real_code(__m256 x) const { return _mm256_sub_ps(_mm256_div_ps(x, scale), shift); }
  // max and min return their second operand where one is NaN: v, so a NaN stays
  __m256 code(__m256 v) const { return _mm256_round_ps(_mm256_min_ps(hi, _mm256_max_ps(lo, v)), ROUND); }
};

template <class T, bool STREAM>
void forward(const void* x, const Grid& grid, void* q, std::int64_t n) {
  const T* in = static_cast<const T*>(x);
  T* out = static_cast<T*>(q);
  const Vectors g(grid);
  const auto eight = [&g](const T* from) {
    return _mm256_mul_ps(_mm256_add_ps(g.code(g.real_code(load(from))), g.shift), g.scale);
  };
  const auto some = [&](std::int64_t i, std::int64_t stop) {
    for (; i + 8 <= stop; i += 8) store<false>(out + i, eight(in + i));
    if (i == stop) return;
    T rest[8] = {};
    std::memcpy(rest, in + i, (stop - i) * sizeof(T));
    store<false>(rest, eight(rest));
    std::memcpy(out + i, rest, (stop - i) * sizeof(T));
  };
  std::int64_t i = 0;
  if (STREAM) {
    constexpr std::int64_t STEP = CACHE_LINE / sizeof(T);
    some(0, i = to_line(out, n));
    for (; i + STEP <= n; i += STEP)
      for (std::int64_t j = i; j < i + STEP; j += 8) store<true>(out + j, eight(in + j));
  }
  some(i, n);
}

struct Lanes {
  __m256 scale, lo, hi, inside;

  // Written out: an implicit constructor would not be compiled for the target of the pragma.
  Lanes() : scale(_mm256_setzero_ps()), lo(scale), hi(scale), inside(scale) {}

  static double total(__m256 v) {
    const __m256d pair =
        _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(pair), _mm256_extractf128_pd(pair, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }

  // of `lo` and `hi`, the factor that a row has in common is missing
  void add_to(Sums& sums, double factor) const {
    sums.scale += total(scale);
    sums.lo += factor * total(lo);
    sums.hi += factor * total(hi);
  }
};

template <class T, bool STREAM, bool MIXED>
void backward(const void* grad, const void* x, const Grid& grid, void* grad_x, std::int64_t n, Sums& sums) {
  const T *in = static_cast<const T*>(x), *up = static_cast<const T*>(grad);
  T* out = static_cast<T*>(grad_x);
  const Vectors g(grid);
  Lanes lanes;
  // `here` keeps the lanes that hold an element: on a grid whose scale is 0 or infinite, the others may turn into NaN
  const auto eight = [&](const T* from, const T* grads, __m256 here) {
    const __m256 given = load(from), v = g.real_code(given), code = g.code(v), d = load(grads);
    const __m256 below = _mm256_cmp_ps(v, g.lo, _CMP_LT_OQ), above = _mm256_cmp_ps(v, g.hi, _CMP_GT_OQ);
    const __m256 outside = _mm256_or_ps(below, above);
    const __m256 slope = _mm256_blendv_ps(_mm256_sub_ps(code, v), _mm256_add_ps(code, g.shift), outside);
    lanes.scale = _mm256_add_ps(lanes.scale, _mm256_and_ps(here, _mm256_mul_ps(d, slope)));
    lanes.lo = _mm256_add_ps(lanes.lo, _mm256_and_ps(_mm256_and_ps(here, below), d));
    lanes.hi = _mm256_add_ps(lanes.hi, _mm256_and_ps(_mm256_and_ps(here, above), d));
    if constexpr (MIXED) lanes.inside = _mm256_add_ps(lanes.inside, _mm256_andnot_ps(outside, _mm256_mul_ps(d, given)));
    return _mm256_andnot_ps(outside, d);
  };
  const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  const auto next_run = [&] {
    lanes.add_to(sums, grid.scale);
    if constexpr (MIXED) sums.inside += Lanes::total(lanes.inside);
    lanes = Lanes();
  };
  const auto some = [&](std::int64_t i, std::int64_t end) {
    while (i + 8 <= end) {
      const std::int64_t stop = std::min(i + RUN, end);
      for (; i + 8 <= stop; i += 8) store<false>(out + i, eight(in + i, up + i, all));
      next_run();
    }
    if (i == end) return;
    T rest[8] = {}, rest_grad[8] = {};
    std::memcpy(rest, in + i, (end - i) * sizeof(T));
    std::memcpy(rest_grad, up + i, (end - i) * sizeof(T));
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i here = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(end - i)), lane);
    store<false>(rest, eight(rest, rest_grad, _mm256_castsi256_ps(here)));
    next_run();
    std::memcpy(out + i, rest, (end - i) * sizeof(T));
  };
  std::int64_t i = 0;
  if (STREAM) {
    some(0, i = to_line(out, n));
    for (; i + RUN <= n; i += RUN) {
      for (std::int64_t j = i; j < i + RUN; j += 8) store<true>(out + j, eight(in + j, up + j, all));
      next_run();
    }
  }
  some(i, n);
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

GridKernels grid_kernels_avx2(Type type, bool stream) { return stream ? kernels<true>(type) : kernels<false>(type); }

void stream_avx2(const float* from, const float* with, float* to, std::int64_t n) {
  std::int64_t i = to_line(to, n);
  const auto plainly = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) to[k] = with ? from[k] + with[k] : from[k];
  };
  plainly(0, i);
  for (; i + 16 <= n; i += 16)
    for (std::int64_t k = i; k < i + 16; k += 8)
      store<true>(to + k, with ? _mm256_add_ps(load(from + k), load(with + k)) : load(from + k));
  _mm_sfence();
  plainly(i, n);
}

}  // namespace sgsc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
