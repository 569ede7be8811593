// int8 with AVX-512, 64 values at a time: tables of 16 entries looked up by permutation on the exponent of a float. Codes are
// those of int8_encode, values those of int8_value (codec_portable.h) bit for bit; tests compare them.
#pragma once
#include "codec_portable.h"

#include <immintrin.h>

namespace fo {

#define FO_INLINE __attribute__((always_inline))

// Four vectors in step, 10 % faster on a Zen 5: one after the other their chains of dependent instructions fill its schedulers.
template <class Stage>
FO_HD void four(const Stage& stage) {
  stage(0);
  stage(1);
  stage(2);
  stage(3);
}

// Decade j of k = [2^j, 2^(j+1)) has exponent 127 + j, of which a permutation takes 4 bits.
template <bool Signed>
struct Int8Decoder {
  struct Tables { float origin[16], step[16]; };
  static constexpr Tables make() {
    Tables tables{};
    constexpr Int8Ramps ramps = make_int8_ramps(Signed);
    for (int t = 0; t < 8; ++t) {
      int entry = (127 + (Signed ? t : t + 1)) & 15;
      tables.origin[entry] = ramps.origin[t];
      tables.step[entry] = ramps.step[t];
    }
    return tables;  // unsigned code 0 is k = 1, in entry 15, whose step stays 0
  }
  static constexpr Tables tables = make();
  __m512 origin, step;

  explicit Int8Decoder(float scale)
      : origin(_mm512_loadu_ps(tables.origin)), step(_mm512_mul_ps(_mm512_loadu_ps(tables.step), _mm512_set1_ps(scale))) {}

  FO_HD void run(const uint8_t* codes, float* values) const {
    const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m512 k = _mm512_cvtepi32_ps(_mm512_add_epi32(code, _mm512_set1_epi32(Signed ? -127 : 1)));
    const __m512i decade = _mm512_srli_epi32(_mm512_castps_si512(k), 23);
    __m512 start = _mm512_permutexvar_ps(decade, origin);
    if (Signed) start = _mm512_or_ps(start, _mm512_and_ps(k, _mm512_set1_ps(-0.f)));
    const __m512 i = _mm512_sub_ps(k, start), by = _mm512_permutexvar_ps(decade, step);
    // k = 0 shares its entry with k = 2
    const __m512 value = Signed ? _mm512_maskz_mul_ps(_mm512_test_epi32_mask(_mm512_castps_si512(k), _mm512_castps_si512(k)), i, by)
                                : _mm512_mul_ps(i, by);
    _mm512_storeu_ps(values, value);
  }
};

// Tables by half of the exponent, of which a permutation takes 4 bits: y is in [2^-24, 1]. Two octaves hold at most one
// boundary of decades: entry e describes their upper part, and below the boundary entry e - 1 applies.
template <bool Signed>
struct Int8Encoder {
  struct Tables { float boundary[16], low[16], inverse[16], last[16]; };
  static constexpr Tables make() {
    Tables tables{};
    constexpr Int8Map map = make_int8_map(Signed);
    float start = 0.5f;
    for (int e = 63; e > 63 - 16; --e, start /= 4) {
      int t = 7;  // decade at the end of the two octaves
      while (t >= (Signed ? 0 : 1) && map.threshold[t] >= 4 * start) --t;
      tables.boundary[e & 15] = t >= 0 && map.threshold[t] > start ? map.threshold[t] : 0.f;
      if (t < 0) {  // k = 0
        tables.last[e & 15] = -0.5f;
        continue;
      }
      tables.low[e & 15] = map.low[t];
      tables.inverse[e & 15] = map.inverse[t];
      tables.last[e & 15] = float((1 << (Signed ? t : t + 1)) - 1);
    }
    return tables;
  }
  static constexpr Tables tables = make();
  __m512 boundary = _mm512_loadu_ps(tables.boundary), low = _mm512_loadu_ps(tables.low), inverse = _mm512_loadu_ps(tables.inverse);
  __m512 last = _mm512_loadu_ps(tables.last);

  // 64 codes of finite values. Saturating packs work on quarters that one permutation puts in order; they turn -1, the missing
  // -1.0, into 0.
  FO_HD void run(const float* values, float inverse_scale, uint8_t* codes) const {
    // Unsigned: y below the first value is that value. Signed: 2^-24 is below the smallest boundary, where k = 0.
    const __m512 smallest = _mm512_set1_ps(Signed ? 5.9604644775390625e-8f : make_int8_map(false).low[0]);
    const __m512 by = _mm512_set1_ps(inverse_scale);
    constexpr int kDown = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;  // a sum just below an integer must not reach it
    __m512 x[4], y[4], end[4];
    __m512i e[4], c[4];
    four([&](int j) FO_INLINE {
      x[j] = _mm512_loadu_ps(values + 16 * j);
      y[j] = _mm512_range_ps(_mm512_mul_ps(x[j], by), smallest, 0xB);  // the larger magnitude
      e[j] = _mm512_srli_epi32(_mm512_castps_si512(y[j]), 24);
    });
    four([&](int j) FO_INLINE {
      const __mmask16 below = _mm512_cmp_ps_mask(y[j], _mm512_permutexvar_ps(e[j], boundary), _CMP_LT_OQ);
      e[j] = _mm512_mask_sub_epi32(e[j], below, e[j], _mm512_set1_epi32(1));
    });
    four([&](int j) FO_INLINE {
      end[j] = _mm512_permutexvar_ps(e[j], last);
      y[j] = _mm512_mul_ps(_mm512_sub_ps(y[j], _mm512_permutexvar_ps(e[j], low)), _mm512_permutexvar_ps(e[j], inverse));
    });
    four([&](int j) FO_INLINE {
      const __m512 i = _mm512_min_ps(y[j], end[j]);
      if (Signed) {
        const __m512 k = _mm512_add_round_ps(i, _mm512_add_ps(end[j], _mm512_set1_ps(1.f)), kDown);
        c[j] = _mm512_cvttps_epi32(_mm512_or_ps(k, _mm512_and_ps(x[j], _mm512_set1_ps(-0.f))));
      } else {
        const __mmask16 nonzero = _mm512_test_epi32_mask(_mm512_castps_si512(x[j]), _mm512_set1_epi32(0x7F800000));
        c[j] = _mm512_maskz_cvttps_epi32(nonzero, _mm512_add_round_ps(i, end[j], kDown));
      }
    });
    const __m512i offset = _mm512_set1_epi16(Signed ? 127 : 0);
    __m512i low16 = _mm512_packs_epi32(c[0], c[1]), high16 = _mm512_packs_epi32(c[2], c[3]);
    if (Signed) low16 = _mm512_add_epi16(low16, offset), high16 = _mm512_add_epi16(high16, offset);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(codes, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low16, high16)));
  }
};

template <bool Signed>
struct Lanes<kFormatInt8, Signed> {
  static constexpr int count = kBlock;

  static void decode(const uint8_t* codes, float scale, float* values) {
    const Int8Decoder<Signed> decoder(scale);
    for (int i = 0; i < kBlock; i += 16) decoder.run(codes + i, values + i);
  }

  static void encode(const float* values, float inverse, uint8_t* codes) {
    const Int8Encoder<Signed> encoder;
    for (int i = 0; i < kBlock; i += 64) encoder.run(values + i, inverse, codes + i);
  }
};

}  // namespace fo
