// The three floating point types by hand, for machines and tables without instructions for them.
#pragma once

#include <cstdint>
#include <cstring>

namespace bitinfer::cpu {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00) return bits_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x0400) return bits_float(sign | ((rest << 13) + 0x38000000u));
  return bits_float(sign | float_bits(static_cast<float>(rest) * 0x1p-24f));
}

// Rounds halves to even, overflows to infinity, keeps NaN.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_bits(value), rest = bits & 0x7fffffffu;
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (rest > 0x7f800000u) return sign | 0x7e00u;
  if (rest >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more
  if (rest < 0x38800000u) {
    // subnormal: one unit in the last place of 0.5 is 2^-24, the spacing of subnormal halves
    return sign | static_cast<uint16_t>(float_bits(bits_float(rest) + 0.5f) - float_bits(0.5f));
  }
  return sign | static_cast<uint16_t>((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1)) >> 13);
}

inline float bfloat16_to_float(uint16_t value) { return bits_float(static_cast<uint32_t>(value) << 16); }

// Rounds halves to even, overflows to infinity, keeps NaN.
inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

}  // namespace bitinfer::cpu
