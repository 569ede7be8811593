// int8c, fp8 and int4 with AVX-512, 64 values at a time. The results are those of the scalar functions bit for bit; tests
// compare them.
#pragma once
#include "codec_portable.h"

#include <immintrin.h>

namespace fo {

FO_HD __m512 sign_bits() { return _mm512_set1_ps(-0.f); }
FO_HD __m512 share(const float* values, __m512 inverse) { return _mm512_mul_ps(_mm512_abs_ps(_mm512_loadu_ps(values)), inverse); }

// Packs work on quarters of a register, which one permutation puts in order at the end.
FO_HD __m512i in_order(__m512i packed) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), packed);
}

// Four vectors of integers as 64 bytes, saturated at 0 and 255, or at -128 and 127.
FO_HD __m512i pack_unsigned(__m512i a, __m512i b, __m512i c, __m512i d) {
  return in_order(_mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
}
FO_HD __m512i pack_signed(__m512i a, __m512i b, __m512i c, __m512i d) {
  return in_order(_mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
}

// Elements that are not zero.
FO_HD __mmask16 present(__m512 x) { return _mm512_test_epi32_mask(_mm512_castps_si512(x), _mm512_set1_epi32(0x7F800000)); }

template <bool Signed>
struct Lanes<kFormatInt8c, Signed> {
  static constexpr int count = kBlock;

  static void decode(const uint8_t* codes, float scale, float* values) {
    const __m512 by = _mm512_set1_ps(scale);
    for (int i = 0; i < kBlock; i += 16) {
      const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
      __m512 y;
      if (Signed) {
        const __m512 q = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(code));
        y = _mm512_div_ps(q, _mm512_sub_ps(_mm512_set1_ps(254.f), _mm512_abs_ps(q)));
      } else {
        const __m512 w = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(code)), _mm512_set1_ps(1.f / 255.f));
        y = _mm512_mul_ps(w, w);
      }
      _mm512_storeu_ps(values + i, _mm512_mul_ps(y, by));
    }
  }

  static FO_HD __m512i code(const float* values, __m512 inverse) {
    const __m512 y = share(values, inverse), x = _mm512_loadu_ps(values), half = _mm512_set1_ps(0.5f);
    if (Signed) {
      __m512 q = _mm512_div_ps(_mm512_mul_ps(_mm512_set1_ps(254.f), y), _mm512_add_ps(_mm512_set1_ps(1.f), y));
      return _mm512_cvttps_epi32(_mm512_or_ps(_mm512_add_ps(q, half), _mm512_and_ps(x, sign_bits())));
    }
    __m512 q = _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(255.f), _mm512_sqrt_ps(y)), half);
    return _mm512_maskz_cvttps_epi32(present(x), _mm512_max_ps(q, _mm512_set1_ps(1.f)));
  }

  static void encode(const float* values, float inverse, uint8_t* codes) {
    const __m512 by = _mm512_set1_ps(inverse);
    for (int i = 0; i < kBlock; i += 64) {
      const __m512i a = code(values + i, by), b = code(values + i + 16, by);
      const __m512i c = code(values + i + 32, by), d = code(values + i + 48, by);
      _mm512_storeu_si512(codes + i, Signed ? pack_signed(a, b, c, d) : pack_unsigned(a, b, c, d));
    }
  }
};

template <bool Signed>
struct Lanes<kFormatFp8, Signed> {
  static constexpr int count = kBlock;

  static void decode(const uint8_t* codes, float scale, float* values) {
    const __m512 by = _mm512_set1_ps(scale), unit = _mm512_set1_ps(Signed ? 1.f / 448.f : 1.f / 1.875f);
    for (int i = 0; i < kBlock; i += 16) {
      const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
      const __m512i mag = Signed ? _mm512_and_si512(code, _mm512_set1_epi32(0x7F)) : code;
      __m512 y = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(mag, 20), _mm512_set1_epi32((Signed ? 120 : 96) << 23)));
      if (Signed) {
        const __mmask16 small = _mm512_testn_epi32_mask(mag, _mm512_set1_epi32(0x78));
        y = _mm512_mask_mul_ps(y, small, _mm512_cvtepi32_ps(mag), _mm512_set1_ps(1.f / 512.f));
        y = _mm512_mul_ps(_mm512_mul_ps(y, unit), by);
        y = _mm512_or_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_andnot_si512(_mm512_set1_epi32(0x7F), code), 24)));
      } else {
        y = _mm512_mul_ps(_mm512_maskz_mul_ps(_mm512_test_epi32_mask(code, code), y, unit), by);
      }
      _mm512_storeu_ps(values + i, y);
    }
  }

  static FO_HD __m512i code(const float* values, __m512 inverse) {
    const __m512 x = _mm512_loadu_ps(values), z = _mm512_mul_ps(share(values, inverse), _mm512_set1_ps(Signed ? 448.f : 1.875f));
    const __m512i b = _mm512_castps_si512(z), bias = _mm512_set1_epi32(0x7FFFF - ((Signed ? 120 : 96) << 23));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 20), _mm512_set1_epi32(1));
    __m512i mag = _mm512_srai_epi32(_mm512_add_epi32(_mm512_add_epi32(b, bias), odd), 20);
    if (!Signed) return _mm512_maskz_max_epi32(present(x), mag, _mm512_set1_epi32(1));
    const __mmask16 small = _mm512_cmp_ps_mask(z, _mm512_set1_ps(0.015625f), _CMP_LT_OQ);
    const __m512i multiple = _mm512_castps_si512(_mm512_add_ps(z, _mm512_set1_ps(16384.f)));
    mag = _mm512_mask_sub_epi32(mag, small, multiple, _mm512_set1_epi32(0x46800000));
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(x), 24), _mm512_set1_epi32(0x80));
    return _mm512_mask_or_epi32(mag, _mm512_test_epi32_mask(mag, mag), mag, sign);
  }

  static void encode(const float* values, float inverse, uint8_t* codes) {
    const __m512 by = _mm512_set1_ps(inverse);
    for (int i = 0; i < kBlock; i += 64) {
      const __m512i a = code(values + i, by), b = code(values + i + 16, by);
      const __m512i c = code(values + i + 32, by), d = code(values + i + 48, by);
      _mm512_storeu_si512(codes + i, pack_unsigned(a, b, c, d));
    }
  }
};

// One register holds all values of the map, times the scale.
template <bool Signed>
struct Lanes<kFormatInt4, Signed> {
  static constexpr int count = kHalfBlock;

  struct Values { float of[16]; };
  static constexpr Values make_values() {
    Values values{};
    for (int c = 0; c < 16; ++c) {
      constexpr Int4Map map{};
      values.of[c] = !Signed ? (float(c) + 1.f) * 0.0625f : c < 7 ? -map.value[7 - c] : map.value[c - 7];
    }
    return values;
  }
  static constexpr Values table = make_values();

  static void decode(const uint8_t* codes, float scale, float* values) {
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(table.of), _mm512_set1_ps(scale));
    const __m512i all = _mm512_loadu_si512(codes);
    const __m512i shift = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    __m512i word = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    for (int i = 0; i < count; i += 16) {
      const __m512i nibbles = _mm512_srlv_epi32(_mm512_permutexvar_epi32(word, all), shift);  // the lookup ignores higher bits
      _mm512_storeu_ps(values + i, _mm512_permutexvar_ps(nibbles, scaled));
      word = _mm512_add_epi32(word, _mm512_set1_epi32(2));
    }
  }

  // Signed: a quarter of an octave holds at most one boundary; 5 bits of y choose it among those from 2^-7 to 1.
  struct Quarters { float boundary[32]; int32_t code[32]; };
  static constexpr Quarters make_quarters() {
    Quarters quarters{};
    constexpr Int4Map map{};
    float octave = 1.f;
    for (int e = 127; e > 119; --e, octave /= 2) {
      for (int q = 0; q < 4; ++q) {
        const float low = octave * (1.f + 0.25f * float(q)), high = low + 0.25f * octave;
        int below = 0, until = 0;
        for (float b : map.boundary) {
          below += b <= low;
          until += b < high;
        }
        quarters.code[(4 * e + q) & 31] = 7 + below;
        quarters.boundary[(4 * e + q) & 31] = until > below ? map.boundary[below] : 2.f;
      }
    }
    return quarters;
  }
  static constexpr Quarters quarters = make_quarters();

  struct Tables {
    __m512 boundary0 = _mm512_loadu_ps(quarters.boundary), boundary1 = _mm512_loadu_ps(quarters.boundary + 16);
    __m512i code0 = _mm512_loadu_si512(quarters.code), code1 = _mm512_loadu_si512(quarters.code + 16);
  };

  static FO_HD __m512i code(const float* values, __m512 inverse, const Tables& t) {
    const __m512 y = share(values, inverse);
    if (!Signed) return _mm512_cvttps_epi32(_mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(16.f), y), _mm512_set1_ps(0.5f)));
    constexpr Int4Map map{};
    const __m512i one = _mm512_set1_epi32(1);
    const __m512i index = _mm512_srli_epi32(_mm512_castps_si512(_mm512_max_ps(y, _mm512_set1_ps(0.0078125f))), 21);
    const __mmask16 above = _mm512_cmp_ps_mask(y, _mm512_permutex2var_ps(t.boundary0, index, t.boundary1), _CMP_GE_OQ);
    __m512i c = _mm512_permutex2var_epi32(t.code0, index, t.code1);
    c = _mm512_mask_add_epi32(c, above, c, one);
    c = _mm512_mask_sub_epi32(c, _mm512_cmp_ps_mask(y, _mm512_set1_ps(map.boundary[0]), _CMP_LT_OQ), c, one);
    return _mm512_mask_sub_epi32(c, _mm512_movepi32_mask(_mm512_castps_si512(_mm512_loadu_ps(values))), _mm512_set1_epi32(14), c);
  }

  // 64 codes, a byte each, in the order of packs; the missing -1.0 is -0.8875.
  static FO_HD __m512i codes64(const float* values, __m512 inverse, const Tables& t) {
    __m512i low = _mm512_packs_epi32(code(values, inverse, t), code(values + 16, inverse, t));
    __m512i high = _mm512_packs_epi32(code(values + 32, inverse, t), code(values + 48, inverse, t));
    const __m512i packed = _mm512_packus_epi16(low, high);
    return Signed ? packed : _mm512_subs_epu8(packed, _mm512_set1_epi8(1));
  }

  static void encode(const float* values, float inverse, uint8_t* codes) {
    const Tables tables;
    const __m512 by = _mm512_set1_ps(inverse);
    const __m512i pair = _mm512_set1_epi16(0x0110);  // 16 times the even element plus the odd one
    const __m512i low = _mm512_maddubs_epi16(codes64(values, by, tables), pair);
    const __m512i high = _mm512_maddubs_epi16(codes64(values + 64, by, tables), pair);
    // Quarter l of the packed bytes: 2 bytes of each of the 8 vectors' quarters l.
    alignas(64) static constexpr uint16_t order[32] = {0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
                                                       4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31};
    _mm512_storeu_si512(codes, _mm512_permutexvar_epi16(_mm512_load_si512(order), _mm512_packus_epi16(low, high)));
  }
};

}  // namespace fo
