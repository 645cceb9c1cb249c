// Single numbers between the dtypes of weights, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "tlinformer/config.h"

namespace tlinformer {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float float_of_half(uint16_t half) {
  const uint32_t sign = uint32_t{half} >> 15 << 31, rest = half & 0x7fff;
  if (rest < 0x0400) {  // subnormal: a multiple of 2^-24
    return float_of(sign | bits_of(std::ldexp(static_cast<float>(rest), -24)));
  }
  const uint32_t exponent = rest >= 0x7c00 ? 0x70000000 : 0x38000000;  // infinities, NaN: to 255
  return float_of(sign | ((rest << 13) + exponent));
}

inline uint16_t half_of(float value) {
  const uint32_t bits = bits_of(value), rest = bits & 0x7fffffff;
  const uint32_t sign = bits >> 31 << 15;
  uint32_t half;
  if (rest > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (rest >= 0x477ff000) {
    half = 0x7c00;  // what is 65520 or more rounds to infinity
  } else if (rest < 0x38800000) {
    half = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);  // the sum rounds to 2^-24
  } else {
    half = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

inline uint16_t bfloat16_of(float value) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Memory that need not be aligned.
inline float load(DType dtype, const char* from) {
  if (dtype == DType::float32) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, from, 2);
  return dtype == DType::float16 ? float_of_half(bits) : float_of(uint32_t{bits} << 16);
}

inline void store(DType dtype, float value, char* to) {
  if (dtype == DType::float32) {
    std::memcpy(to, &value, 4);
    return;
  }
  const uint16_t bits = dtype == DType::float16 ? half_of(value) : bfloat16_of(value);
  std::memcpy(to, &bits, 2);
}

}  // namespace tlinformer
