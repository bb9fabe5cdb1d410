// Element types, and conversions to and from float that round to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace sgsc {

enum class Type { f32, f64, bf16, f16 };

struct Bfloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

inline std::int64_t size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(Bfloat16 value) { return float_of(std::uint32_t{value.bits} << 16); }

inline float widen(Float16 value) {
  const std::uint32_t sign = std::uint32_t{value.bits} >> 15 << 31, rest = value.bits & 0x7fffu;
  if (rest < 0x0400) return float_of(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));  // below 2^-14
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);          // infinity or NaN
  return float_of(sign | ((rest << 13) + (112u << 23)));  // exponents count from 127 there, from 15 here
}

inline void narrow(float value, float& out) { out = value; }
inline void narrow(double value, double& out) { out = value; }

inline void narrow(float value, Bfloat16& out) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t even = bits + 0x7fffu + (bits >> 16 & 1u);
  out.bits = value != value ? 0x7fc0 : static_cast<std::uint16_t>(even >> 16);
}

inline void narrow(float value, Float16& out) {
  const std::uint32_t sign = bits_of(value) >> 31 << 15, rest = bits_of(value) & 0x7fffffffu;
  std::uint32_t half;
  if (rest >= 0x47800000u) {  // 2^16 and above: infinity, or NaN
    half = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (rest < 0x38800000u) {  // below 2^-14: the sum's unit in the last place is 2^-24, so it rounds for us
    half = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
  } else {
    half = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
  }
  out.bits = static_cast<std::uint16_t>(sign | half);
}

// use(T{}) with T the elements' type, of which f64 is none.
template <class Use>
void as_element(Type type, const Use& use) {
  if (type == Type::f32) return use(float{});
  if (type == Type::bf16) return use(Bfloat16{});
  use(Float16{});
}

// Elements first .. first + n - 1 of an array of `type`, as floats.
inline void to_floats(Type type, const void* from, std::int64_t first, std::int64_t n, float* to) {
  as_element(type, [&](auto element) {
    const auto* x = static_cast<const decltype(element)*>(from) + first;
    for (std::int64_t i = 0; i < n; ++i) to[i] = widen(x[i]);
  });
}

}  // namespace sgsc
