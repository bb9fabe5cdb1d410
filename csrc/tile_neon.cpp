// NEON with the dot product of ARMv8.2: a line is four registers. Its products are of signed bytes.
#include "tile_common.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace sgsc {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "byte 0 of a level's lane is its lowest");

template <class T>
struct Four {
  T a, b, c, d;
};

struct V {
  using B = Four<uint8x16_t>;
  using I = Four<int32x4_t>;
  using F = Four<float32x4_t>;
  static constexpr int MOST = 4;
  static constexpr bool IN_PLACE = false;  // a field at the top of its byte would be a sign

  template <class Use, class... T>
  static auto each(const Use& use, const Four<T>&... x) -> Four<decltype(use(x.a...))> {
    return {use(x.a...), use(x.b...), use(x.c...), use(x.d...)};
  }
  template <class T>
  static Four<T> same(T v) {
    return {v, v, v, v};
  }

  static B bytes(const void* p) {
    const auto* at = static_cast<const std::uint8_t*>(p);
    return {vld1q_u8(at), vld1q_u8(at + 16), vld1q_u8(at + 32), vld1q_u8(at + 48)};
  }
  static I integers(const std::int32_t* p) {
    return {vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)};
  }
  static F floats(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
  static void store(std::uint8_t* p, const B& v) {
    vst1q_u8(p, v.a);
    vst1q_u8(p + 16, v.b);
    vst1q_u8(p + 32, v.c);
    vst1q_u8(p + 48, v.d);
  }
  static void store(std::int32_t* p, const I& v) {
    vst1q_s32(p, v.a);
    vst1q_s32(p + 4, v.b);
    vst1q_s32(p + 8, v.c);
    vst1q_s32(p + 12, v.d);
  }
  static void store(float* p, const F& v) {
    vst1q_f32(p, v.a);
    vst1q_f32(p + 4, v.b);
    vst1q_f32(p + 8, v.c);
    vst1q_f32(p + 12, v.d);
  }
  static B no_bytes() { return same(vdupq_n_u8(0)); }
  static I zero() { return same(vdupq_n_s32(0)); }
  static F no_floats() { return same(vdupq_n_f32(0)); }
  static B spread(const void* p) { return same(vreinterpretq_u8_s32(vdupq_n_s32(word(p)))); }
  static F spread(const float* p) { return same(vld1q_dup_f32(p)); }
  // Shifts of bytes serve as well: what a field is masked with lies inside its byte.
  template <int N>
  static B right(const B& v) {
    return each([](uint8x16_t x) { return vshrq_n_u8(x, N); }, v);
  }
  template <int N>
  static B left(const B& v) {
    return each([](uint8x16_t x) { return vshlq_n_u8(x, N); }, v);
  }
  template <int N>
  static I exactly_right(const I& v) {  // for sums in place, which are not used here
    return each([](int32x4_t x) { return vshrq_n_s32(x, N); }, v);
  }
  static B keep(const B& a, std::uint8_t m) {
    return each([m](uint8x16_t x) { return vandq_u8(x, vdupq_n_u8(m)); }, a);
  }
  static B join(const B& a, const B& b, std::uint8_t m) {
    return each([m](uint8x16_t x, uint8x16_t y) { return vorrq_u8(x, vandq_u8(y, vdupq_n_u8(m))); }, a, b);
  }
  static I plus(const I& a, const I& b) {
    return each([](int32x4_t x, int32x4_t y) { return vaddq_s32(x, y); }, a, b);
  }
  // A level of eight bits is taken as level - 128, and 128 times the sum of x added as 64 times it, twice.
  template <int BITS>
  static I dot(const I& sum, const B& levels, const B& x) {
    return each(
        [](int32x4_t s, uint8x16_t l, uint8x16_t v) {
          const int8x16_t value = vreinterpretq_s8_u8(v), half = vdupq_n_s8(64);
          if (BITS < 8) return vdotq_s32(s, vreinterpretq_s8_u8(l), value);
          const int32x4_t less = vdotq_s32(vdotq_s32(vdupq_n_s32(0), half, value), half, value);
          return vdotq_s32(vaddq_s32(s, less), vreinterpretq_s8_u8(veorq_u8(l, vdupq_n_u8(128))), value);
        },
        sum, levels, x);
  }
  static F offsets(const float* p) { return floats(p); }
  // A look-up past the register gives 0, so that one takes a byte of each lane to 32 bits.
  template <int BYTE>
  static F value(const B& quad, const F& plus) {
    constexpr std::uint32_t ABSENT = 0xffffff00u + BYTE;
    const uint8x16_t at = vreinterpretq_u8_u32(uint32x4_t{ABSENT, ABSENT + 4, ABSENT + 8, ABSENT + 12});
    return each(
        [at](uint8x16_t bytes, float32x4_t p) {
          return vaddq_f32(vcvtq_f32_u32(vreinterpretq_u32_u8(vqtbl1q_u8(bytes, at))), p);
        },
        quad, plus);
  }
  static F add(const F& a, const F& b) {
    return each([](float32x4_t x, float32x4_t y) { return vaddq_f32(x, y); }, a, b);
  }
  static F fma(const F& a, const F& b, const F& c) {
    return each([](float32x4_t x, float32x4_t y, float32x4_t z) { return vfmaq_f32(z, x, y); }, a, b, c);
  }
  static void prefetch(const std::uint8_t* p, int lines) {
    for (int i = 0; i < lines; ++i) __builtin_prefetch(p + AHEAD + i * LINE);
  }
};

#include "tile_kernels.inc"

}  // namespace

const TileKernels tile_kernels_neon = table;

}  // namespace sgsc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
