// int8 blocks: absmax, then codes in vectors where the instruction set has permutations, otherwise element by element.
#if defined(__AVX512F__)
#include "codec_avx512.h"
#elif defined(__AVX2__)
#include "codec_avx2.h"
#else
#include "codec_portable.h"
#endif
#include "tile.h"

#include <cstring>

namespace fo {

template <bool Signed>
static void decode_block(const uint8_t* __restrict codes, float scale, int n, float* __restrict values) {
  const Decoder<Signed> decoder(scale);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) decoder.run(codes + i, values + i);
  if (i == n) return;
  uint8_t in[kLanes] = {};
  float out[kLanes];
  std::memcpy(in, codes + i, size_t(n - i));
  decoder.run(in, out);
  std::memcpy(values + i, out, size_t(n - i) * sizeof(float));
}

template <bool Signed>
static void encode_values(const float* __restrict values, float inverse, int n, uint8_t* __restrict codes) {
  const Encoder<Signed> encoder(inverse);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) encoder.run(values + i, codes + i);
  if (i == n) return;
  float in[kLanes] = {};
  uint8_t out[kLanes];
  std::memcpy(in, values + i, size_t(n - i) * sizeof(float));
  encoder.run(in, out);
  std::memcpy(codes + i, out, size_t(n - i));
}

template <bool Signed>
static float encode_block(const float* __restrict values, int n, uint8_t* __restrict codes) {
  uint32_t largest = 0;
  for (int i = 0; i < n; ++i) {
    uint32_t m = magnitude(values[i]);
    largest = m > largest ? m : largest;
  }
  const float scale = block_scale(largest), inverse = inverse_scale(scale);
  if (!Signed && !(inverse > 0.f)) std::memset(codes, 0, size_t(n));  // the lanes leave this case out
  else encode_values<Signed>(values, inverse, n, codes);
  return scale;
}

void decode_int8(const uint8_t* codes, const float* scales, int64_t n, bool is_signed, float* values) {
  for (int64_t i = 0; i < n; i += kBlock) {
    const int count = int(n - i < kBlock ? n - i : kBlock);
    if (is_signed) decode_block<true>(codes + i, scales[i / kBlock], count, values + i);
    else decode_block<false>(codes + i, scales[i / kBlock], count, values + i);
  }
}

void encode_int8(const float* values, int64_t n, bool is_signed, uint8_t* codes, float* scales) {
  for (int64_t i = 0; i < n; i += kBlock) {
    const int count = int(n - i < kBlock ? n - i : kBlock);
    scales[i / kBlock] = is_signed ? encode_block<true>(values + i, count, codes + i) : encode_block<false>(values + i, count, codes + i);
  }
}

}  // namespace fo
