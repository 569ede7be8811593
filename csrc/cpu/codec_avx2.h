// int8 and decoding of int4 with AVX2: 8 values at a time, tables of 8 entries looked up by permutation. The rest is portable.
// The results are those of the scalar functions bit for bit; tests compare them.
#pragma once
#include "codec_portable.h"

#include <immintrin.h>

namespace fo {

FO_HD __m256 lookup8(__m256 table, __m256i index) { return _mm256_permutevar8x32_ps(table, index); }  // index modulo 8

template <bool Signed>
struct Int8Decoder {
  static constexpr Int8Ramps ramps = make_int8_ramps(Signed);
  __m256 origin, step;

  explicit Int8Decoder(float scale)
      : origin(_mm256_loadu_ps(ramps.origin)), step(_mm256_mul_ps(_mm256_loadu_ps(ramps.step), _mm256_set1_ps(scale))) {}

  FO_HD void run(const uint8_t* codes, float* values) const {
    const __m256 sign = _mm256_set1_ps(-0.f);
    __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    __m256 k = _mm256_cvtepi32_ps(_mm256_add_epi32(code, _mm256_set1_epi32(Signed ? -127 : 1)));
    __m256i t = _mm256_sub_epi32(_mm256_srli_epi32(_mm256_castps_si256(k), 23), _mm256_set1_epi32(Signed ? 127 : 128));
    __m256 start = lookup8(origin, t);
    if (Signed) start = _mm256_or_ps(start, _mm256_and_ps(k, sign));
    __m256 value = _mm256_mul_ps(_mm256_sub_ps(k, start), lookup8(step, t));
    __m256i zero = _mm256_cmpeq_epi32(code, _mm256_set1_epi32(Signed ? 127 : 0));
    _mm256_storeu_ps(values, _mm256_andnot_ps(_mm256_castsi256_ps(zero), value));
  }
};

template <bool Signed>
struct Int8Encoder {
  static constexpr Int8Map map = make_int8_map(Signed);
  struct Last { float value[8]; };
  static constexpr Last make() {
    Last last{};
    for (int t = 0; t < 8; ++t) last.value[t] = float((1 << (Signed ? t : t + 1)) - 1);
    return last;
  }
  static constexpr Last lasts = make();
  __m256 low = _mm256_loadu_ps(map.low), inverse = _mm256_loadu_ps(map.inverse), threshold = _mm256_loadu_ps(map.threshold);
  __m256 last = _mm256_loadu_ps(lasts.value);

  // Codes of 8 finite values as integers: -1 stands for 0 (the missing -1.0).
  FO_HD __m256i code(const float* values, float inverse_scale) const {
    const __m256 sign = _mm256_set1_ps(-0.f);
    const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi32(1);
    __m256 x = _mm256_loadu_ps(values), magnitude = _mm256_andnot_ps(sign, x);
    __m256 y = _mm256_mul_ps(magnitude, _mm256_set1_ps(inverse_scale));
    if (!Signed) y = _mm256_max_ps(y, _mm256_set1_ps(map.low[0]));                   // below the first value: that value
    __m256i e = _mm256_srli_epi32(_mm256_castps_si256(y), 23);
    __m256i t = _mm256_add_epi32(_mm256_add_epi32(_mm256_slli_epi32(e, 2), e),
                                 _mm256_set1_epi32(Signed ? kDecadeOffsetSigned : kDecadeOffsetUnsigned));
    t = _mm256_max_epi32(_mm256_srai_epi32(t, 4), zero);
    t = _mm256_min_epi32(t, _mm256_set1_epi32(Signed ? 7 : 6));
    __m256i next = Signed ? t : _mm256_add_epi32(t, one);
    __m256i below = _mm256_castps_si256(_mm256_cmp_ps(y, lookup8(threshold, next), _CMP_LT_OQ));
    t = _mm256_add_epi32(next, below);
    __m256 end = lookup8(last, t);
    __m256 i = _mm256_min_ps(_mm256_mul_ps(_mm256_sub_ps(y, lookup8(low, t)), lookup8(inverse, t)), end);
    __m256i code = _mm256_add_epi32(_mm256_cvttps_epi32(i), _mm256_cvttps_epi32(end));
    if (Signed) {
      __m256i k = _mm256_andnot_si256(_mm256_srai_epi32(t, 31), _mm256_add_epi32(code, one));  // t = -1: k = 0
      __m256i negative = _mm256_srai_epi32(_mm256_castps_si256(x), 31);
      k = _mm256_sub_epi32(_mm256_xor_si256(k, negative), negative);
      code = _mm256_add_epi32(k, _mm256_set1_epi32(127));
    } else {
      __m256i empty = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x00800000), _mm256_castps_si256(magnitude));
      code = _mm256_andnot_si256(empty, code);
    }
    return code;
  }

  // 32 codes: saturating packs, which also turn -1 into 0, work on halves that one permutation puts in order.
  FO_HD void run(const float* values, float inverse_scale, uint8_t* codes) const {
    const __m256i low16 = _mm256_packs_epi32(code(values, inverse_scale), code(values + 8, inverse_scale));
    const __m256i high16 = _mm256_packs_epi32(code(values + 16, inverse_scale), code(values + 24, inverse_scale));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low16, high16), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), packed);
  }
};

template <bool Signed>
struct Lanes<kFormatInt8, Signed> {
  static constexpr int count = kBlock;

  static void decode(const uint8_t* codes, float scale, float* values) {
    const Int8Decoder<Signed> decoder(scale);
    for (int i = 0; i < kBlock; i += 8) decoder.run(codes + i, values + i);
  }

  static void encode(const float* values, float inverse, uint8_t* codes) {
    const Int8Encoder<Signed> encoder;
    for (int i = 0; i < kBlock; i += 32) encoder.run(values + i, inverse, codes + i);
  }
};

// The values of the map times the scale, 8 in a register. Encoding stays portable.
template <bool Signed>
struct Lanes<kFormatInt4, Signed> {
  static constexpr int count = kHalfBlock;

  static void decode(const uint8_t* codes, float scale, float* values) {
    alignas(32) float table[16];
    for (int c = 0; c < 16; ++c) table[c] = int4_decode<Signed>(uint8_t(c), scale);
    const __m256 low = _mm256_load_ps(table), high = _mm256_load_ps(table + 8);
    const __m256i shift = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    for (int i = 0; i < count; i += 8) {
      int32_t word;
      std::memcpy(&word, codes + i / 2, sizeof word);
      const __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(word), shift);  // the lookup ignores higher bits
      const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
      _mm256_storeu_ps(values + i, _mm256_blendv_ps(lookup8(low, code), lookup8(high, code), bit3));
    }
  }

  static void encode(const float* values, float inverse, uint8_t* codes) { encode_int4<Signed>(values, inverse, codes); }
};

}  // namespace fo
