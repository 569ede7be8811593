// Vectors for the int8 codec: GCC vector types, whose operators work lane by lane, and the few operations that need intrinsics.
#pragma once
#include "../scalar.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fo {

#if defined(__AVX512F__)

#define FO_LANES 16
typedef float FloatV __attribute__((vector_size(64)));
typedef int32_t IntV __attribute__((vector_size(64)));

// 8 entries twice, so that any index works modulo 8
FO_HD FloatV load_table(const float* t) { return (FloatV)_mm512_broadcast_f32x8(_mm256_loadu_ps(t)); }
FO_HD FloatV lookup(FloatV table, IntV index) { return (FloatV)_mm512_permutexvar_ps((__m512i)index, (__m512)table); }
FO_HD FloatV load_floats(const float* x) { return (FloatV)_mm512_loadu_ps(x); }
FO_HD void store_floats(float* x, FloatV v) { _mm512_storeu_ps(x, (__m512)v); }
FO_HD IntV load_bytes(const uint8_t* x) { return (IntV)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x)); }
FO_HD void store_bytes(uint8_t* x, IntV v) { _mm_storeu_si128((__m128i*)x, _mm512_cvtepi32_epi8((__m512i)v)); }
FO_HD IntV truncate(FloatV x) { return (IntV)_mm512_cvttps_epi32((__m512)x); }
FO_HD FloatV to_float(IntV x) { return (FloatV)_mm512_cvtepi32_ps((__m512i)x); }

#elif defined(__AVX2__)

#define FO_LANES 8
typedef float FloatV __attribute__((vector_size(32)));
typedef int32_t IntV __attribute__((vector_size(32)));

FO_HD FloatV load_table(const float* t) { return (FloatV)_mm256_loadu_ps(t); }
FO_HD FloatV lookup(FloatV table, IntV index) { return (FloatV)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index); }
FO_HD FloatV load_floats(const float* x) { return (FloatV)_mm256_loadu_ps(x); }
FO_HD void store_floats(float* x, FloatV v) { _mm256_storeu_ps(x, (__m256)v); }
FO_HD IntV load_bytes(const uint8_t* x) { return (IntV)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)x)); }
FO_HD void store_bytes(uint8_t* x, IntV v) {
  __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64((__m128i*)x, _mm_packus_epi16(words, words));
}
FO_HD IntV truncate(FloatV x) { return (IntV)_mm256_cvttps_epi32((__m256)x); }
FO_HD FloatV to_float(IntV x) { return (FloatV)_mm256_cvtepi32_ps((__m256i)x); }

#else

#define FO_LANES 1  // SSE2 has no permutation by variable: the codec stays scalar

#endif

}  // namespace fo
