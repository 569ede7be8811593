// int8 blocks in vectors: formats.h's decode and encode lane by lane, the 8-entry tables looked up by permutation.
// Every operation is formats.h's, in its order, so all instruction sets give the same bits; tails take the scalar functions.
#pragma once
#include "../formats.h"
#include "simd.h"

namespace fo {

template <bool Signed>
struct Int8Tables {
  static constexpr Int8Map map = make_int8_map(Signed);
};

template <bool Signed>
static __attribute__((noinline)) void decode_int8_block(const uint8_t* __restrict codes, float scale, int n, float* __restrict values) {
  constexpr auto& map = Int8Tables<Signed>::map;
  int i = 0;
#if FO_LANES > 1
  const FloatV base = load_table(map.base), step = load_table(map.step);
  for (; i + FO_LANES <= n; i += FO_LANES) {
    IntV code = load_bytes(codes + i);
    IntV k = Signed ? (code > 127 ? code - 127 : 127 - code) : code + 1;
    FloatV kf = to_float(k);
    IntV kb = (IntV)kf;
    IntV t = (kb >> 23) - (Signed ? 127 : 128);  // lookup takes it modulo 8
    FloatV value = lookup(base, t) + (kf - (FloatV)(kb & int32_t(0xFF800000))) * lookup(step, t);
    value = (Signed ? k == 0 : code == 0) ? FloatV{} : value;
    if (Signed) value = code < 127 ? -value : value;
    store_floats(values + i, value * scale);
  }
#endif
  for (; i < n; ++i) values[i] = int8_decode<Signed>(codes[i], scale, map);
}

template <bool Signed>
static __attribute__((noinline)) float encode_int8_block(const float* __restrict values, int n, uint8_t* __restrict codes) {
  constexpr auto& map = Int8Tables<Signed>::map;
  uint32_t largest = 0;
  for (int i = 0; i < n; ++i) {
    uint32_t m = magnitude(values[i]);
    largest = m > largest ? m : largest;
  }
  const float scale = block_scale(largest), inverse = inverse_scale(scale);
  int i = 0;
#if FO_LANES > 1
  const FloatV low = load_table(map.low), steps = load_table(map.inverse), threshold = load_table(map.threshold);
  const FloatV one = FloatV{} + 1.f, zero = {};
  const IntV unit = IntV{} + 1;
  for (; i + FO_LANES <= n; i += FO_LANES) {
    IntV x = (IntV)load_floats(values + i);
    IntV mag = x & 0x7FFFFFFF;
    FloatV y = (FloatV)mag * inverse;
    y = y < one ? y : one;
    IntV t = (5 * ((IntV)y >> 23) + (Signed ? kDecadeOffsetSigned : kDecadeOffsetUnsigned)) >> 4;
    constexpr int top = Signed ? 7 : 6;
    t = t < 0 ? IntV{} : t;
    t = t > top ? IntV{} + top : t;
    if (Signed) t += y >= lookup(threshold, t) ? IntV{} : IntV{} - 1;
    else t += y >= lookup(threshold, t + 1) ? unit : IntV{};
    IntV count = unit << (Signed ? t & 7 : t + 1);
    FloatV last = to_float(count - 1), k = (y - lookup(low, t)) * lookup(steps, t);
    k = k < last ? k : last;
    k = k > zero ? k : zero;
    IntV code = count + truncate(k);
    if (Signed) {
      code = t < 0 ? IntV{} : code;
      code = x < 0 ? 127 - (code > 127 ? IntV{} + 127 : code) : 127 + code;
    } else {
      code = mag >= 0x00800000 ? code - 1 : IntV{};
      code = inverse > 0.f ? code : IntV{};
    }
    store_bytes(codes + i, code);
  }
#endif
  for (; i < n; ++i) codes[i] = int8_encode<Signed>(values[i], inverse, map);
  return scale;
}

// `values` and `codes` start at a block; the last block may be short.
static inline void decode_int8(const uint8_t* codes, const float* scales, int64_t n, bool is_signed, float* values) {
  for (int64_t i = 0; i < n; i += kBlock) {
    int count = int(n - i < kBlock ? n - i : kBlock);
    if (is_signed) decode_int8_block<true>(codes + i, scales[i / kBlock], count, values + i);
    else decode_int8_block<false>(codes + i, scales[i / kBlock], count, values + i);
  }
}

static inline void encode_int8(const float* values, int64_t n, bool is_signed, uint8_t* codes, float* scales) {
  for (int64_t i = 0; i < n; i += kBlock) {
    int count = int(n - i < kBlock ? n - i : kBlock);
    scales[i / kBlock] = is_signed ? encode_int8_block<true>(values + i, count, codes + i) : encode_int8_block<false>(values + i, count, codes + i);
  }
}

}  // namespace fo
