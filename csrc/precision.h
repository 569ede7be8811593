// Loads and stores of 16-bit floats: exact widening, rounding to nearest even, stochastic rounding with 16 random bits, and
// bf16 with low bits beside it (split24, split32).
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

// The bits of a weight that is split: of a NaN only what fits in bf16.
FO_HD uint32_t split_bits(float x) {
  uint32_t u = bits(x);
  return (u & 0x7FFFFFFFu) > 0x7F800000u ? (u & 0xFFFF0000u) | 0x400000u : u;
}

struct Split { uint16_t high; int16_t low; };

// bf16 rounded to nearest, ties away from zero, and the signed 16 bits that are left: the fp32 weight exactly.
FO_HD Split split32(float x) {
  uint32_t u = split_bits(x);
  return {uint16_t((u + 0x8000u) >> 16), int16_t(uint16_t(u))};
}

// The same with 8 bits left (low is an int8), after rounding to 24 bits stochastically.
FO_HD Split split24(float x, uint32_t random16) {
  uint32_t u = (split_bits(x) + (random16 >> 8)) >> 8;
  return {uint16_t((u + 0x80u) >> 8), int16_t(int8_t(uint8_t(u)))};
}

// The weight of a split; low is shifted left by 8 for split24. Where the high half is a zero that was put there later, negative
// low bits are dropped: they would wrap around into a NaN.
FO_HD float join(uint16_t high, int32_t low) {
  bool stale = (high & 0x7FFFu) == 0 && low < 0;
  return from_bits((uint32_t(high) << 16) + uint32_t(stale ? 0 : low));
}

// What rounding cut off (kahan); 0 where the rounded value is not finite.
FO_HD float remainder(float x, float rounded) { return magnitude(rounded) < 0x7F800000u ? x - rounded : 0.f; }

}  // namespace fo
