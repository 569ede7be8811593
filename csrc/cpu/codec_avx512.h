// int8 lanes with AVX-512: 16 values at a time, tables of 16 and 32 entries looked up by permutation on a float's exponent.
// The results are those of int8_decode and int8_encode bit for bit; tests compare them.
#pragma once
#include "codec_portable.h"

#include <immintrin.h>

namespace fo {

// Decade j of k = [2^j, 2^(j+1)) has exponent 127 + j, of which a permutation takes 4 bits.
template <bool Signed>
struct Int8Decoder {
  struct Tables { float base[16], step[16]; };
  static constexpr Tables make() {
    Tables tables{};
    constexpr Int8Map map = make_int8_map(Signed);
    for (int t = 0; t < 8; ++t) {
      int entry = (127 + (Signed ? t : t + 1)) & 15;
      tables.base[entry] = map.base[t];
      tables.step[entry] = map.step[t];
    }
    return tables;  // unsigned code 0 is k = 1, in entry 15, which stays 0
  }
  static constexpr Tables tables = make();
  __m512 base = _mm512_loadu_ps(tables.base), step = _mm512_loadu_ps(tables.step);

  FO_HD void run(const uint8_t* codes, float scale, float* values) const {
    __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    __m512i k = _mm512_add_epi32(code, _mm512_set1_epi32(Signed ? -127 : 1));
    __m512 whole = _mm512_cvtepi32_ps(k), kf = Signed ? _mm512_abs_ps(whole) : whole;
    __m512i kb = _mm512_castps_si512(kf), decade = _mm512_srli_epi32(kb, 23);
    __m512 power = _mm512_castsi512_ps(_mm512_and_si512(kb, _mm512_set1_epi32(int32_t(0xFF800000))));
    __m512 ramp = _mm512_mul_ps(_mm512_sub_ps(kf, power), _mm512_permutexvar_ps(decade, step));
    __m512 start = _mm512_permutexvar_ps(decade, base), value;
    if (Signed) {
      value = _mm512_maskz_add_ps(_mm512_test_epi32_mask(k, k), start, ramp);
      value = _mm512_or_ps(value, _mm512_and_ps(whole, _mm512_set1_ps(-0.f)));
    } else {
      value = _mm512_add_ps(start, ramp);
    }
    _mm512_storeu_ps(values, _mm512_mul_ps(value, _mm512_set1_ps(scale)));
  }
};

// Tables by exponent, of which a permutation of 32 entries takes 5 bits: y is in [2^-24, 1]. An octave holds at most one
// boundary of decades: entry e describes its upper part, and below the boundary entry e - 1 applies.
template <bool Signed>
struct Int8Encoder {
  struct Tables { float boundary[32], low[32], inverse[32], last[32]; };
  static constexpr Tables make() {
    Tables tables{};
    constexpr Int8Map map = make_int8_map(Signed);
    float octave = 1.f;
    for (int e = 127; e > 127 - 32; --e, octave /= 2) {
      int t = 7;  // decade at the end of the octave
      while (t >= (Signed ? 0 : 1) && map.threshold[t] >= 2 * octave) --t;
      tables.boundary[e & 31] = t >= 0 && map.threshold[t] > octave ? map.threshold[t] : 0.f;
      if (t < 0) {  // k = 0
        tables.last[e & 31] = -0.5f;
        continue;
      }
      tables.low[e & 31] = map.low[t];
      tables.inverse[e & 31] = map.inverse[t];
      tables.last[e & 31] = float((1 << (Signed ? t : t + 1)) - 1);
    }
    return tables;
  }
  static constexpr Tables tables = make();

  struct Table {
    __m512 head, tail;
    explicit Table(const float* x) : head(_mm512_loadu_ps(x)), tail(_mm512_loadu_ps(x + 16)) {}
    FO_HD __m512 operator[](__m512i index) const { return _mm512_permutex2var_ps(head, index, tail); }
  };
  Table boundary{tables.boundary}, low{tables.low}, inverse{tables.inverse}, last{tables.last};

  // Codes of 16 finite values as integers: -1 stands for 0 (the missing -1.0).
  FO_HD __m512i code(const float* values, float inverse_scale) const {
    // Unsigned: y below the first value is that value. Signed: 2^-24 is below the smallest boundary, where k = 0.
    const __m512 smallest = _mm512_set1_ps(Signed ? 5.9604644775390625e-8f : make_int8_map(false).low[0]);
    __m512 x = _mm512_loadu_ps(values), magnitude = _mm512_abs_ps(x);
    __m512 y = _mm512_max_ps(_mm512_mul_ps(magnitude, _mm512_set1_ps(inverse_scale)), smallest);
    __m512i e = _mm512_srli_epi32(_mm512_castps_si512(y), 23);
    e = _mm512_mask_sub_epi32(e, _mm512_cmp_ps_mask(y, boundary[e], _CMP_LT_OQ), e, _mm512_set1_epi32(1));
    __m512 end = last[e], i = _mm512_min_ps(_mm512_mul_ps(_mm512_sub_ps(y, low[e]), inverse[e]), end);
    constexpr int kDown = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;  // a sum just below an integer must not reach it
    if (Signed) {
      __m512 k = _mm512_add_round_ps(i, _mm512_add_ps(end, _mm512_set1_ps(1.f)), kDown);
      k = _mm512_or_ps(k, _mm512_and_ps(x, _mm512_set1_ps(-0.f)));
      return _mm512_add_epi32(_mm512_cvttps_epi32(k), _mm512_set1_epi32(127));
    }
    __mmask16 nonzero = _mm512_cmp_epi32_mask(_mm512_castps_si512(magnitude), _mm512_set1_epi32(0x00800000), _MM_CMPINT_NLT);
    return _mm512_maskz_cvttps_epi32(nonzero, _mm512_add_round_ps(i, end, kDown));
  }

  // 64 codes at a time: saturating packs, which also turn -1 into 0, work on quarters that one permutation puts in order.
  FO_HD void run(const float* values, float inverse_scale, uint8_t* codes) const {
    __m512i low16 = _mm512_packs_epi32(code(values, inverse_scale), code(values + 16, inverse_scale));
    __m512i high16 = _mm512_packs_epi32(code(values + 32, inverse_scale), code(values + 48, inverse_scale));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(codes, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low16, high16)));
  }
};

template <bool Signed>
struct Lanes<kFormatInt8, Signed> {
  static constexpr int count = kBlock;

  static void decode(const uint8_t* codes, float scale, float* values) {
    const Int8Decoder<Signed> decoder;
    for (int i = 0; i < kBlock; i += 16) decoder.run(codes + i, scale, values + i);
  }

  static void encode(const float* values, float inverse, uint8_t* codes) {
    const Int8Encoder<Signed> encoder;
    for (int i = 0; i < kBlock; i += 64) encoder.run(values + i, inverse, codes + i);
  }
};

}  // namespace fo
