// int8 and decoding of int4 with AVX2: 8 values at a time, tables of 8 entries looked up by permutation. The rest is portable.
// The results are those of the scalar functions bit for bit; tests compare them.
#pragma once
#include "codec_portable.h"

#include <immintrin.h>

namespace fo {

FO_HD __m256 lookup8(__m256 table, __m256i index) { return _mm256_permutevar8x32_ps(table, index); }  // index modulo 8

// Decade j of k = [2^j, 2^(j+1)) has exponent 127 + j, of which a permutation takes 3 bits.
template <bool Signed>
struct Int8Decoder {
  struct Tables { float origin[8], step[8]; };
  static constexpr Tables make() {
    Tables tables{};
    constexpr Int8Ramps ramps = make_int8_ramps(Signed);
    for (int t = 0; t < 8; ++t) {
      const int entry = (127 + (Signed ? t : t + 1)) & 7;
      tables.origin[entry] = ramps.origin[t];
      tables.step[entry] = ramps.step[t];
    }
    return tables;
  }
  static constexpr Tables tables = make();
  __m256 origin, step;

  explicit Int8Decoder(float scale)
      : origin(_mm256_loadu_ps(tables.origin)), step(_mm256_mul_ps(_mm256_loadu_ps(tables.step), _mm256_set1_ps(scale))) {}

  FO_HD void run(const uint8_t* codes, float* values) const {
    const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const __m256i number = _mm256_add_epi32(code, _mm256_set1_epi32(Signed ? -127 : 1));
    const __m256 k = _mm256_cvtepi32_ps(Signed ? _mm256_abs_epi32(number) : number);
    const __m256i decade = _mm256_srli_epi32(_mm256_castps_si256(k), 23);
    __m256 value = _mm256_mul_ps(_mm256_sub_ps(k, lookup8(origin, decade)), lookup8(step, decade));
    // The code of zero shares an entry with a larger k and comes out negative.
    value = _mm256_max_ps(value, _mm256_setzero_ps());
    if (Signed) value = _mm256_or_ps(value, _mm256_and_ps(_mm256_castsi256_ps(number), _mm256_set1_ps(-0.f)));
    _mm256_storeu_ps(values, value);
  }
};

template <bool Signed>
struct Int8Encoder {
  // The 15 highest bits of a positive float times this, shifted right by 23, is 32 + t where y is the largest value (t = 7) and
  // changes once within each decade, so that t or t - 1 is the decade of y. Entry 15 stands for t = -1, where k = 0.
  static constexpr int kDecades = 20464;
  struct Tables { uint8_t first[16]; };
  static constexpr Tables make() {
    Tables tables{};
    for (int t = 0; t < 8; ++t) tables.first[t] = uint8_t(Signed ? 1 << t : (2 << t) - 1);
    return tables;
  }
  static constexpr Tables tables = make();
  static constexpr Int8Map map = make_int8_map(Signed);
  __m256 low = _mm256_loadu_ps(map.low), inverse = _mm256_loadu_ps(map.inverse), threshold = _mm256_loadu_ps(map.threshold);

  // 8 finite values: t (32 more than that, or all bits set for the code of zero) and the unclamped place within the decade.
  FO_HD void place(__m256 x, __m256 by, __m256i& t, __m256i& i) const {
    // Unsigned: y below the first value is that value. Signed: 2^-24 is below the smallest boundary, where k = 0.
    const __m256 smallest = _mm256_set1_ps(Signed ? 5.9604644775390625e-8f : map.low[0]);
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.f), x), y = _mm256_max_ps(_mm256_mul_ps(size, by), smallest);
    t = _mm256_srli_epi32(_mm256_madd_epi16(_mm256_castps_si256(y), _mm256_set1_epi32(kDecades << 16)), 23);
    t = _mm256_add_epi32(t, _mm256_castps_si256(_mm256_cmp_ps(y, lookup8(threshold, t), _CMP_LT_OQ)));
    i = _mm256_cvttps_epi32(_mm256_mul_ps(_mm256_sub_ps(y, lookup8(low, t)), lookup8(inverse, t)));
    if (!Signed) t = _mm256_or_si256(t, _mm256_castps_si256(_mm256_cmp_ps(size, _mm256_set1_ps(from_bits(kSmallest)), _CMP_LT_OQ)));
  }

  // 32 codes. Saturating packs work on halves that one permutation puts in order.
  FO_HD void run(const float* values, float inverse_scale, uint8_t* codes) const {
    const __m256 by = _mm256_set1_ps(inverse_scale);
    __m256i x[4], t[4], i[4];
    for (int j = 0; j < 4; ++j) {
      const __m256 value = _mm256_loadu_ps(values + 8 * j);
      x[j] = _mm256_castps_si256(value);
      place(value, by, t[j], i[j]);
    }
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tables.first)));
    const __m256i first = _mm256_shuffle_epi8(table, pack(t));
    const __m256i last = Signed ? _mm256_subs_epu8(first, _mm256_set1_epi8(1)) : first;
    __m256i code = _mm256_add_epi8(first, _mm256_min_epu8(pack(i), last));
    if (Signed) {  // 127 - k = 255 - (128 + k), where 256 saturates
      const __m256i negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), pack(x));
      code = _mm256_xor_si256(_mm256_adds_epu8(code, _mm256_sub_epi8(_mm256_set1_epi8(127), negative)), negative);
    }
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permutevar8x32_epi32(code, order));
  }

  static FO_HD __m256i pack(const __m256i (&a)[4]) {
    return _mm256_packs_epi16(_mm256_packs_epi32(a[0], a[1]), _mm256_packs_epi32(a[2], a[3]));
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
