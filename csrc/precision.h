// Loads and stores of 16-bit floats: exact widening, rounding to nearest even, and stochastic rounding with 16 random bits.
// Everything works on bits, so flush-to-zero of subnormals does not touch it.
#pragma once
#include "scalar.h"

namespace fo {

FO_HD float bf16_to_float(uint16_t h) { return from_bits(uint32_t(h) << 16); }

FO_HD uint16_t float_to_bf16(float x) {
  uint32_t u = bits(x);
  uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  bool nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
  return uint16_t(nan ? (u >> 16) | 0x40u : rounded);
}

// Rounds away from zero with probability (low 16 bits) / 65536; NaN and infinity pass.
FO_HD uint16_t float_to_bf16_stochastic(float x, uint32_t random16) {
  uint32_t u = bits(x);
  bool finite = (u & 0x7F800000u) != 0x7F800000u;
  bool nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
  uint32_t v = finite ? u + random16 : u | (nan ? 0x400000u : 0u);
  return uint16_t(v >> 16);
}

FO_HD float f16_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000u) << 16, mag = h & 0x7FFFu;
  uint32_t normal = (mag << 13) + (112u << 23);
  uint32_t special = (mag << 13) | 0x7F800000u;                // infinity and NaN
  uint32_t small = bits(float(int32_t(mag)) * 5.9604644775390625e-8f);  // subnormals: mantissa * 2^-24, a normal fp32 number
  uint32_t out = mag >= 0x7C00u ? special : mag < 0x400u ? small : normal;
  return from_bits(out | sign);
}

// |x| as bits with everything that becomes fp16 infinity at 65536 and NaN at 1.5 * 65536, whose rounded bits are 0x7C00 and 0x7E00.
FO_HD uint32_t f16_magnitude(float x) {
  uint32_t mag = bits(x) & 0x7FFFFFFFu;
  return mag < 0x47800000u ? mag : mag > 0x7F800000u ? 0x47C00000u : 0x47800000u;
}

constexpr uint32_t kSmallestF16 = 113u << 23;  // 2^-14, the smallest normal fp16 number

FO_HD uint16_t float_to_f16(float x) {
  uint32_t sign = (bits(x) >> 16) & 0x8000u, mag = f16_magnitude(x);
  uint32_t normal = (mag - (112u << 23) + 0xFFFu + ((mag >> 13) & 1u)) >> 13;
  uint32_t small = bits(from_bits(mag) + 0.5f) - 0x3F000000u;  // the sum rounds to a multiple of 2^-24, ties to even
  return uint16_t((mag < kSmallestF16 ? small : normal) | sign);
}

FO_HD uint16_t float_to_f16_stochastic(float x, uint32_t random16) {
  uint32_t sign = (bits(x) >> 16) & 0x8000u, mag = f16_magnitude(x);
  uint32_t normal = (mag - (112u << 23) + (random16 >> 3)) >> 13;  // 13 bits are dropped
  float scaled = from_bits(mag < kSmallestF16 ? mag : kSmallestF16) * 16777216.f;  // subnormals: multiples of 2^-24
  int32_t whole = int32_t(scaled);
  uint32_t small = uint32_t(whole) + uint32_t((scaled - float(whole)) * 65536.f > float(int32_t(random16)));
  uint32_t mask = 0u - uint32_t(mag < kSmallestF16);  // with a conditional expression gcc 12 finds a branch here and stays scalar
  return uint16_t((small & mask) | (normal & ~mask) | sign);
}

}  // namespace fo
