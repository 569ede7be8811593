// Blocks of codes by the scalar functions of csrc/formats, in loops that the compiler vectorises but for int8 and signed int4.
#pragma once
#include "../formats.h"

namespace fo {

// int8 values as (|k| - origin) * step, one operation less than int8_decode where the scale is part of the steps. Both round
// less than 1e-6 of the value away. Entry t as in Int8Map; t = 7 is 1, and in the unsigned map also k = 1, whose value is 0.
struct Int8Ramps { float origin[8], step[8]; };

constexpr Int8Ramps make_int8_ramps(bool is_signed) {
  Int8Ramps ramps{};
  for (int t = 0; t < 7; ++t) {
    const double n = double(1 << (is_signed ? t : t + 1));
    ramps.origin[t] = float(8 * n / 9 - 0.5);
    ramps.step[t] = float(pow10i(t - 6) * 0.9 / n);
  }
  ramps.origin[7] = is_signed ? 127.f : 255.f;
  ramps.step[7] = 1.f;
  return ramps;
}

template <bool Signed>
FO_HD float int8_value(uint8_t code, const Int8Ramps& ramps, float scale) {
  const int k = Signed ? int(code) - 127 : code + 1;
  const float kf = float(Signed && k < 0 ? -k : k);
  const int t = (int(bits(kf) >> 23) - (Signed ? 127 : 128)) & 7;
  const float value = (kf - ramps.origin[t]) * (ramps.step[t] * scale);
  return (Signed ? k == 0 : code == 0) ? 0.f : Signed && k < 0 ? -value : value;
}

template <int32_t Format, bool Signed>
FO_HD float decode_one(uint8_t code, float scale) {
  if constexpr (Format == kFormatInt8) {
    constexpr Int8Ramps ramps = make_int8_ramps(Signed);
    return int8_value<Signed>(code, ramps, scale);
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

template <bool Signed>
static void encode_int4(const float* __restrict values, float inverse, uint8_t* __restrict codes) {
  uint8_t half[kHalfBlock];
  for (int i = 0; i < kHalfBlock; ++i) half[i] = int4_encode<Signed>(values[i], inverse);
  for (int i = 0; i < kHalfBlock / 2; ++i) codes[i] = uint8_t(half[2 * i] << 4 | half[2 * i + 1]);
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
      encode_int4<Signed>(values, inverse, codes);
    } else {
      for (int i = 0; i < count; ++i) codes[i] = encode_one<Format, Signed>(values[i], inverse);
    }
  }
};

}  // namespace fo
