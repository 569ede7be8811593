// int8 lanes of the instruction set this file is compiled for: Decoder and Encoder of kLanes elements, and a block's scale.
#pragma once
#if defined(__AVX512F__)
#include "codec_avx512.h"
#elif defined(__AVX2__)
#include "codec_avx2.h"
#else
#include "codec_portable.h"
#endif

namespace fo {

static inline float scale_of(const float* values, int count) {
  uint32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t m = magnitude(values[i]);
    largest = m > largest ? m : largest;
  }
  return block_scale(largest);
}

// A block without an inverse scale: all zeros, or one with a NaN or an infinity, whose scale says so. The lanes leave it out.
template <bool Signed>
static void encode_unscaled(const float* values, int n, uint8_t* codes) {
  for (int i = 0; i < n; ++i) {
    const uint8_t end = bits(values[i]) >> 31 ? 0 : 255;
    codes[i] = !Signed ? 0 : magnitude(values[i]) < 0x7F800000u ? 127 : end;
  }
}

}  // namespace fo
