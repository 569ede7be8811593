// Blocks of codes by the scalar functions of csrc/formats, in loops that the compiler vectorises but for int8 and signed int4.
#pragma once
#include "../formats.h"

namespace fo {

template <int32_t Format, bool Signed>
FO_HD float decode_one(uint8_t code, float scale) {
  if constexpr (Format == kFormatInt8) {
    constexpr Int8Map map = make_int8_map(Signed);
    return int8_decode<Signed>(code, scale, map);
  } else if constexpr (Format == kFormatInt8c) {
    return int8c_decode<Signed>(code, scale);
  } else if constexpr (Format == kFormatFp8) {
    return fp8_decode<Signed>(code, scale);
  } else {
    return int4_decode<Signed>(code, scale);
  }
}

template <int32_t Format, bool Signed>
FO_HD uint8_t encode_one(float x, float inverse) {
  if constexpr (Format == kFormatInt8) {
    constexpr Int8Map map = make_int8_map(Signed);
    return int8_encode<Signed>(x, inverse, map);
  } else if constexpr (Format == kFormatInt8c) {
    return int8c_encode<Signed>(x, inverse);
  } else if constexpr (Format == kFormatFp8) {
    return fp8_encode<Signed>(x, inverse);
  } else {
    return int4_encode<Signed>(x, inverse);
  }
}

// Codes that share a scale. Specialised where an instruction set has something better.
template <int32_t Format, bool Signed>
struct Lanes {
  static constexpr int count = Format == kFormatInt4 ? kHalfBlock : kBlock;

  static void decode(const uint8_t* __restrict codes, float scale, float* __restrict values) {
    if constexpr (Format == kFormatInt4) {
      for (int i = 0; i < count / 2; ++i) {
        values[2 * i] = int4_decode<Signed>(codes[i] >> 4, scale);
        values[2 * i + 1] = int4_decode<Signed>(codes[i] & 15, scale);
      }
    } else {
      for (int i = 0; i < count; ++i) values[i] = decode_one<Format, Signed>(codes[i], scale);
    }
  }

  static void encode(const float* __restrict values, float inverse, uint8_t* __restrict codes) {
    if constexpr (Format == kFormatInt4) {
      uint8_t half[count];
      for (int i = 0; i < count; ++i) half[i] = int4_encode<Signed>(values[i], inverse);
      for (int i = 0; i < count / 2; ++i) codes[i] = uint8_t(half[2 * i] << 4 | half[2 * i + 1]);
    } else {
      for (int i = 0; i < count; ++i) codes[i] = encode_one<Format, Signed>(values[i], inverse);
    }
  }
};

}  // namespace fo
