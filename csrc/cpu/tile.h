// Loads and stores of a tile: 16-bit floats and int8 blocks between memory and fp32 buffers in the first-level cache.
#pragma once
#include "../philox.h"
#include "../precision.h"
#include "codec.h"

namespace fo {

// Elements per tile where a stream needs decoding: AdamW's four buffers take 16 KB of a 32 or 48 KB first-level cache.
constexpr int kTile = 1024;
static_assert(kGrainSize % kTile == 0 && kTile % kBlock == 0, "tiles divide grains, blocks divide tiles");

static __attribute__((noinline)) void load_bf16(const uint16_t* __restrict x, int n, float* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = bf16_to_float(x[i]);
}

static __attribute__((noinline)) void store_bf16(const float* __restrict x, int n, uint16_t* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = float_to_bf16(x[i]);
}

static __attribute__((noinline)) void load_f16(const uint16_t* __restrict x, int n, float* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = f16_to_float(x[i]);
}

static __attribute__((noinline)) void store_f16(const float* __restrict x, int n, uint16_t* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = float_to_f16(x[i]);
}

// The 16 random bits of `n` elements from element `start`, a multiple of 8 tiles' octets: vectorised over octets.
// A word holds the bits of two elements, the even one in its low half, which is their order in little-endian memory.
static __attribute__((noinline)) void random_tile(const Head& head, uint32_t tensor, int64_t start, int n, uint16_t* __restrict out) {
  uint32_t words[kTile / 2];
  const Head key = head;
  const uint64_t first = uint64_t(start) / 8;
  const uint32_t low = uint32_t(first);
  const uint64_t high = first - low;
  const int octets = (n + 7) / 8;
  for (int i = 0; i < octets; ++i) {
    Random8 r = philox8(key, tensor, high + uint32_t(low + i));
    for (int w = 0; w < 4; ++w) words[4 * i + w] = r.word[w];
  }
  std::memcpy(out, words, size_t(n) * 2);
}

static __attribute__((noinline)) void store_bf16_stochastic(const float* __restrict x, const uint16_t* __restrict random, int n,
                                                             uint16_t* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = float_to_bf16_stochastic(x[i], random[i]);
}

static __attribute__((noinline)) void store_f16_stochastic(const float* __restrict x, const uint16_t* __restrict random, int n,
                                                            uint16_t* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = float_to_f16_stochastic(x[i], random[i]);
}

// A tile as fp32: in place where it is stored so, otherwise decoded into `buffer`.
static inline float* load_tile(int64_t address, int32_t dtype, int64_t offset, int n, float* buffer) {
  if (dtype == kF32) return reinterpret_cast<float*>(address) + offset;
  auto* halves = reinterpret_cast<const uint16_t*>(address) + offset;
  if (dtype == kBF16) load_bf16(halves, n, buffer);
  else load_f16(halves, n, buffer);
  return buffer;
}

static inline float* load_state(int64_t address, int64_t scale, int32_t format, int64_t offset, int n, float* buffer) {
  if ((format & kFormatMask) != kFormatInt8) return load_tile(address, format & kFormatMask, offset, n, buffer);
  decode_int8(reinterpret_cast<const uint8_t*>(address) + offset, reinterpret_cast<const float*>(scale) + offset / kBlock, n,
              format & kFormatSigned, buffer);
  return buffer;
}
static_assert(kFormatF32 == int(kF32) && kFormatBF16 == int(kBF16), "unscaled formats share the codes of their dtypes");

static inline void store_state(int64_t address, int64_t scale, int32_t format, int64_t offset, int n, const float* values) {
  if ((format & kFormatMask) == kFormatInt8) {
    encode_int8(values, n, format & kFormatSigned, reinterpret_cast<uint8_t*>(address) + offset,
                reinterpret_cast<float*>(scale) + offset / kBlock);
  } else if ((format & kFormatMask) == kFormatBF16) {
    store_bf16(values, n, reinterpret_cast<uint16_t*>(address) + offset);
  }
}

static inline void store_param(int64_t address, const Launch& launch, const Head& head, uint32_t tensor, int64_t offset, int n,
                               const float* values) {
  if (launch.param_dtype == kF32) return;
  auto* out = reinterpret_cast<uint16_t*>(address) + offset;
  if (launch.precision == kStochastic) {
    uint16_t random[kTile];
    random_tile(head, tensor, offset, n, random);
    if (launch.param_dtype == kBF16) store_bf16_stochastic(values, random, n, out);
    else store_f16_stochastic(values, random, n, out);
  } else if (launch.param_dtype == kBF16) {
    store_bf16(values, n, out);
  } else {
    store_f16(values, n, out);
  }
}

}  // namespace fo
