// Codes of 256 values for every coded format, in vectors where the instruction set has some; streams and their tails on top.
#include "codec.h"

#if defined(__AVX512F__)
#include "codec_avx512.h"
#include "vectors_avx512.h"
#elif defined(__AVX2__)
#include "codec_avx2.h"
#else
#include "codec_portable.h"
#endif

namespace fo {

static FO_HD uint32_t largest_magnitude(const float* values, int n) {
  uint32_t largest = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t m = magnitude(values[i]);
    largest = m > largest ? m : largest;
  }
  return largest;
}

// The scale of values that hold a NaN, an infinity or more than 2^126, which become +-scale: they take the code of the largest value.
static __attribute__((noinline)) float scale_finite(float* values, int n) {
  uint32_t largest = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t m = finite_magnitude(values[i]);
    largest = m > largest ? m : largest;
  }
  const float scale = block_scale(saturated(largest));
  for (int i = 0; i < n; ++i) {
    if (magnitude(values[i]) > bits(scale)) values[i] = from_bits(bits(scale) | (bits(values[i]) & 0x80000000u));
  }
  return scale;
}

template <int Parts>
static void scale_block(float* values, float* scales, float* inverses) {
  constexpr int n = kBlock / Parts;
  for (int part = 0; part < Parts; ++part) {
    const uint32_t largest = largest_magnitude(values + part * n, n);
    scales[part] = largest <= kLargest ? block_scale(largest) : scale_finite(values + part * n, n);
    inverses[part] = inverse_scale(scales[part]);
  }
}

template <int32_t Format, bool Signed>
static void decode_block(const uint8_t* codes, const float* scales, float* values) {
  constexpr int n = Lanes<Format, Signed>::count, bytes = Format == kFormatInt4 ? n / 2 : n;
  // Steps of the int8 map times a tiny scale would be flushed to zero.
  constexpr float kTiny = 5.42101086242752217e-20f;  // 2^-64
  const bool tiny = Format == kFormatInt8 && scales[0] < kTiny && scales[0] > 0.f;
  for (int i = 0; i < kBlock / n; ++i) {
    Lanes<Format, Signed>::decode(codes + i * bytes, tiny ? scales[i] / kTiny : scales[i], values + i * n);
  }
  if (tiny) for (int i = 0; i < kBlock; ++i) values[i] *= kTiny;
}

template <int32_t Format, bool Signed>
static void encode_block(const float* values, const float* inverses, uint8_t* codes) {
  constexpr int n = Lanes<Format, Signed>::count, bytes = Format == kFormatInt4 ? n / 2 : n;
  constexpr int zero = !Signed ? 0 : Format == kFormatInt8 ? 127 : Format == kFormatInt4 ? 0x77 : 0;
  for (int i = 0; i < kBlock / n; ++i) {
    if (inverses[i] > 0.f) Lanes<Format, Signed>::encode(values + i * n, inverses[i], codes + i * bytes);
    else std::memset(codes + i * bytes, zero, bytes);
  }
}

template <int32_t Format, bool Signed>
static constexpr BlockCodec codec() {
  constexpr bool half = Format == kFormatInt4;
  return {decode_block<Format, Signed>, encode_block<Format, Signed>, scale_block<half ? 2 : 1>, half ? 2 : 1, half ? 4 : 8};
}

const BlockCodec& block_codec(int32_t format) {
  static constexpr BlockCodec codecs[][2] = {
      {codec<kFormatInt8, false>(), codec<kFormatInt8, true>()},
      {codec<kFormatInt8c, false>(), codec<kFormatInt8c, true>()},
      {codec<kFormatFp8, false>(), codec<kFormatFp8, true>()},
      {codec<kFormatInt4, false>(), codec<kFormatInt4, true>()},
  };
  return codecs[(format & kFormatMask) - kFormatInt8][format & kFormatSigned ? 1 : 0];
}

void decode_blocks(int32_t format, const uint8_t* codes, const float* scales, int64_t n, float* values) {
  const BlockCodec& codec = block_codec(format);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) codec.decode(codes + i * codec.bits / 8, scales + i * codec.parts / kBlock, values + i);
  if (i == n) return;
  uint8_t bytes[kBlock] = {};
  float two[2] = {}, out[kBlock];
  const int count = int(n - i), parts = (count * codec.parts + kBlock - 1) / kBlock;
  std::memcpy(bytes, codes + i * codec.bits / 8, size_t((count * codec.bits + 7) / 8));
  std::memcpy(two, scales + i * codec.parts / kBlock, size_t(parts) * sizeof(float));
  codec.decode(bytes, two, out);
  std::memcpy(values + i, out, size_t(count) * sizeof(float));
}

void encode_blocks(int32_t format, const float* values, int64_t n, uint8_t* codes, float* scales) {
  const BlockCodec& codec = block_codec(format);
  for (int64_t i = 0; i < n; i += kBlock) {
    const int count = int(n - i < kBlock ? n - i : kBlock), parts = (count * codec.parts + kBlock - 1) / kBlock;
    float in[kBlock], two[2], inverses[2];
    uint8_t bytes[kBlock];
    std::memcpy(in, values + i, size_t(count) * sizeof(float));
    if (count < kBlock) std::memset(in + count, 0, size_t(kBlock - count) * sizeof(float));
    codec.scale(in, two, inverses);
    std::memcpy(scales + i * codec.parts / kBlock, two, size_t(parts) * sizeof(float));
    uint8_t* out = codes + i * codec.bits / 8;
    codec.encode(in, inverses, count == kBlock ? out : bytes);
    if (count < kBlock) std::memcpy(out, bytes, size_t((count * codec.bits + 7) / 8));
  }
}

}  // namespace fo
