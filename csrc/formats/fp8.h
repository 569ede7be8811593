// fp8. signed: OCP e4m3 with 448 at the scale, subnormals included, no NaN. unsigned: the sign bit goes to the exponent, e5m3
// without subnormals: code c > 0 is (1 + (c & 7) / 8) 2^(c / 8 - 31) / 1.875 of the scale, so that 255 is 1; code 0 is 0.
#pragma once
#include "scale.h"

namespace fo {

template <bool Signed>
FO_HD float fp8_decode(uint8_t code, float scale) {
  if (Signed) {
    uint32_t mag = code & 0x7Fu;
    float normal = from_bits((mag << 20) + (120u << 23)), small = float(int32_t(mag)) * (1.f / 512.f);
    float value = (mag < 8u ? small : normal) * (1.f / 448.f);
    return from_bits(bits(value * scale) | uint32_t(code & 0x80u) << 24);
  }
  float value = from_bits((uint32_t(code) << 20) + (96u << 23)) * (1.f / 1.875f);
  return (code ? value : 0.f) * scale;
}

template <bool Signed>
FO_HD uint8_t fp8_encode(float x, float inverse) {
  const float y = share_of_scale(x, inverse);
  if (Signed) {
    float z = y * 448.f;
    uint32_t b = bits(z);
    uint32_t normal = (b + 0x7FFFFu + ((b >> 20) & 1u) - (120u << 23)) >> 20;
    uint32_t small = bits((z < 0.015625f ? z : 0.f) + 16384.f) - 0x46800000u;  // rounds to multiples of 2^-9, ties to even
    uint32_t mag = z < 0.015625f ? small : normal;
    return uint8_t(mag | (mag ? (bits(x) >> 24) & 0x80u : 0u));
  }
  uint32_t b = bits(y * 1.875f);
  int32_t c = int32_t(b + 0x7FFFFu + ((b >> 20) & 1u) - (96u << 23)) >> 20;  // below 2^-31: negative
  return uint8_t(!present(x, inverse) ? 0 : c < 1 ? 1 : c);
}

}  // namespace fo
