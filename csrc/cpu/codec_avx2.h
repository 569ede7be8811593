// int8 with AVX2: 8 values at a time, the 8-entry tables of formats/int8.h looked up by permutation. Other formats: portable.
// The results are those of the scalar functions bit for bit; tests compare them.
#pragma once
#include "codec_portable.h"

#include <immintrin.h>

namespace fo {

FO_HD __m256 lookup8(__m256 table, __m256i index) { return _mm256_permutevar8x32_ps(table, index); }  // index modulo 8

template <bool Signed>
struct Int8Decoder {
  static constexpr Int8Map map = make_int8_map(Signed);
  __m256 base = _mm256_loadu_ps(map.base), step = _mm256_loadu_ps(map.step);

  FO_HD void run(const uint8_t* codes, float scale, float* values) const {
    const __m256 sign = _mm256_set1_ps(-0.f);
    __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    __m256 whole = _mm256_cvtepi32_ps(_mm256_add_epi32(code, _mm256_set1_epi32(Signed ? -127 : 1)));
    __m256 kf = _mm256_andnot_ps(sign, whole);
    __m256i kb = _mm256_castps_si256(kf);
    __m256i t = _mm256_sub_epi32(_mm256_srli_epi32(kb, 23), _mm256_set1_epi32(Signed ? 127 : 128));
    __m256 power = _mm256_castsi256_ps(_mm256_and_si256(kb, _mm256_set1_epi32(int32_t(0xFF800000))));
    __m256 value = _mm256_add_ps(lookup8(base, t), _mm256_mul_ps(_mm256_sub_ps(kf, power), lookup8(step, t)));
    __m256i zero = _mm256_cmpeq_epi32(code, _mm256_set1_epi32(Signed ? 127 : 0));
    value = _mm256_andnot_ps(_mm256_castsi256_ps(zero), value);
    if (Signed) value = _mm256_or_ps(value, _mm256_and_ps(whole, sign));
    _mm256_storeu_ps(values, _mm256_mul_ps(value, _mm256_set1_ps(scale)));
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

  FO_HD void run(const float* values, float inverse_scale, uint8_t* codes) const {
    const __m256 sign = _mm256_set1_ps(-0.f);
    const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi32(1);
    __m256 x = _mm256_loadu_ps(values), magnitude = _mm256_andnot_ps(sign, x);
    __m256 y = _mm256_min_ps(_mm256_mul_ps(magnitude, _mm256_set1_ps(inverse_scale)), _mm256_set1_ps(1.f));  // NaN gives the second operand
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
      code = _mm256_add_epi32(_mm256_max_epi32(k, _mm256_set1_epi32(-127)), _mm256_set1_epi32(127));
    } else {
      __m256i empty = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x00800000), _mm256_castps_si256(magnitude));
      code = _mm256_andnot_si256(empty, code);
    }
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), _mm_packus_epi16(words, words));
  }
};

template <bool Signed>
struct Lanes<kFormatInt8, Signed> {
  static constexpr int count = kBlock;

  static void decode(const uint8_t* codes, float scale, float* values) {
    const Int8Decoder<Signed> decoder;
    for (int i = 0; i < kBlock; i += 8) decoder.run(codes + i, scale, values + i);
  }

  static void encode(const float* values, float inverse, uint8_t* codes) {
    const Int8Encoder<Signed> encoder;
    for (int i = 0; i < kBlock; i += 8) encoder.run(values + i, inverse, codes + i);
  }
};

}  // namespace fo
