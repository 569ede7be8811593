// int8 blocks: absmax, then codes in vectors where the instruction set has permutations, otherwise element by element.
#include "codec.h"
#include "tile.h"

#include <cstring>

namespace fo {

// Calls run(in, out) for whole vectors, then for the rest in buffers: nothing beyond the n elements is touched.
template <class In, class Out, class Run>
static FO_HD void for_lanes(const In* in, Out* out, int n, Run&& run) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) run(in + i, out + i);
  if (i == n) return;
  In in_tail[kLanes] = {};
  Out out_tail[kLanes];
  std::memcpy(in_tail, in + i, size_t(n - i) * sizeof(In));
  run(in_tail, out_tail);
  std::memcpy(out + i, out_tail, size_t(n - i) * sizeof(Out));
}

template <bool Signed>
static void decode_blocks(const uint8_t* __restrict codes, const float* __restrict scales, int64_t n, float* __restrict values) {
  const Decoder<Signed> decoder;
  for (int64_t i = 0; i < n; i += kBlock) {
    const float scale = scales[i / kBlock];
    for_lanes(codes + i, values + i, int(n - i < kBlock ? n - i : kBlock),
              [&](const uint8_t* in, float* out) __attribute__((always_inline)) { decoder.run(in, scale, out); });
  }
}

// Scales of all blocks first: their reductions and divisions then overlap instead of delaying each block's codes.
template <bool Signed>
static void encode_tile(const float* __restrict values, int n, uint8_t* __restrict codes, float* __restrict scales) {
  float inverse[kTile / kBlock];
  for (int i = 0; i < n; i += kBlock) {
    const int count = n - i < kBlock ? n - i : kBlock;
    const float scale = scale_of(values + i, count);
    scales[i / kBlock] = scale;
    inverse[i / kBlock] = inverse_scale(scale);
  }
  const Encoder<Signed> encoder;
  for (int i = 0; i < n; i += kBlock) {
    const int count = n - i < kBlock ? n - i : kBlock;
    const float factor = inverse[i / kBlock];
    if (!(factor > 0.f)) {
      encode_unscaled<Signed>(values + i, count, codes + i);
    } else {
      for_lanes(values + i, codes + i, count,
                [&](const float* in, uint8_t* out) __attribute__((always_inline)) { encoder.run(in, factor, out); });
    }
  }
}

void decode_int8(const uint8_t* codes, const float* scales, int64_t n, bool is_signed, float* values) {
  if (is_signed) decode_blocks<true>(codes, scales, n, values);
  else decode_blocks<false>(codes, scales, n, values);
}

void encode_int8(const float* values, int64_t n, bool is_signed, uint8_t* codes, float* scales) {
  for (int64_t i = 0; i < n; i += kTile) {
    const int count = int(n - i < kTile ? n - i : kTile);
    if (is_signed) encode_tile<true>(values + i, count, codes + i, scales + i / kBlock);
    else encode_tile<false>(values + i, count, codes + i, scales + i / kBlock);
  }
}

}  // namespace fo
