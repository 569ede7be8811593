// Steps with int8 states: a pipeline over whole blocks. While one block is decoded and updated, the block before it is encoded.
//
// Work on one block at a time, with the encoding put off by one, keeps loads from memory going; tiles of 1024 elements, which
// pause them for longer, take a quarter more time from memory and the same from cache. So do pieces of 64, for other reasons:
// each loads the tables of the codec again. Software prefetch of g and p makes it 15 to 20 % slower at any distance.
#pragma once
#include "codec.h"
#include "parallel.h"
#include "tile.h"

namespace fo {

template <bool Signed>
static FO_HD void decode_block(const uint8_t* codes, float scale, float* values) {
  const Decoder<Signed> decoder;
  for (int i = 0; i < kBlock; i += kLanes) decoder.run(codes + i, scale, values + i);
}

template <bool Signed>
static FO_HD void encode_block(const float* values, float inverse, uint8_t* codes) {
  const Encoder<Signed> encoder;
  if (inverse > 0.f) for (int i = 0; i < kBlock; i += kWide) encoder.run_wide(values + i, inverse, codes + i);
  else encode_unscaled<Signed>(values, kBlock, codes);
}

template <class Rule>
static bool any_int8(const Launch& launch) {
  bool any = false;
  for (int i = 0; i < Rule::state_count; ++i) any |= (launch.formats[i] & kFormatMask) == kFormatInt8;
  return any;
}

// Steps the whole blocks among n elements from `start` of a row; returns how many elements that is.
// update(n, g, p, states): the rule on fp32 arrays.
template <class Rule, class Update>
static int64_t step_blocks(const Launch& launch, const Row& row, const Head& head, int64_t start, int64_t n, const Update& update) {
  constexpr int kStates = Rule::state_count;
  alignas(64) float values[kStates][2][kBlock], grads[kBlock], params[kBlock];
  uint8_t* codes[kStates] = {};
  float *scales[kStates] = {}, inverse[kStates] = {};
  bool is_signed[kStates];
  for (int i = 0; i < kStates; ++i) {
    is_signed[i] = launch.formats[i] & kFormatSigned;
    if ((launch.formats[i] & kFormatMask) != kFormatInt8) continue;
    codes[i] = reinterpret_cast<uint8_t*>(row[kState + i]) + start;
    scales[i] = reinterpret_cast<float*>(row[kScale + i]) + start / kBlock;
  }
  const int64_t blocks = n / kBlock;
  for (int64_t block = 0; block <= blocks; ++block) {
    const int now = block & 1;
    if (block < blocks) {
      const int64_t offset = start + block * kBlock;
      float* g = load_tile(row[kGrad], launch.grad_dtype, offset, kBlock, grads);
      float* p = load_tile(row[kParam], launch.param_dtype, offset, kBlock, params);
      float* s[kMaxStates] = {};
      for (int i = 0; i < kStates; ++i) {
        s[i] = values[i][now];
        if (!codes[i]) s[i] = load_state(row[kState + i], 0, launch.formats[i], offset, kBlock, s[i]);
        else if (is_signed[i]) decode_block<true>(codes[i] + block * kBlock, scales[i][block], s[i]);
        else decode_block<false>(codes[i] + block * kBlock, scales[i][block], s[i]);
      }
      update(kBlock, g, p, s);
      for (int i = 0; i < kStates; ++i) {
        if (!codes[i]) store_state(row[kState + i], 0, launch.formats[i], offset, kBlock, s[i]);
      }
      store_param(row[kParam], launch, head, uint32_t(row.tensor()), offset, kBlock, p);
    }
    for (int i = 0; i < kStates; ++i) {
      if (!codes[i]) continue;
      if (block > 0) {
        uint8_t* out = codes[i] + (block - 1) * kBlock;
        if (is_signed[i]) encode_block<true>(values[i][1 - now], inverse[i], out);
        else encode_block<false>(values[i][1 - now], inverse[i], out);
      }
      if (block == blocks) continue;
      const float scale = scale_of(values[i][now], kBlock);
      scales[i][block] = scale;
      inverse[i] = inverse_scale(scale);
    }
  }
  return blocks * kBlock;
}

}  // namespace fo
