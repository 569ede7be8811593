// Steps of streams that are not all fp32 or bf16 in place: a pipeline over blocks of 256 elements. While the coded states of
// one block are decoded and updated, those of the block before it are encoded.
//
// Work on one block at a time, with the encoding put off by one, keeps loads from memory going; tiles of 1024 elements, which
// pause them for longer, take a quarter more time from memory and the same from cache. Without the delay int8 takes 7 % more
// time in cache, int8c 8 %, int4 the same. Slower too (AdamW on a Zen 5): pieces of 64 or 128, each of which loads the tables of
// its codec again, and an update in two halves with the encoding between them, 3 % (the divider, which bounds the update, does
// not overlap with the codecs that way). Software prefetch of g and p makes it 15 to 20 % slower at any distance.
#pragma once
#include "codec.h"
#include "parallel.h"
#include "tile.h"

namespace fo {

struct CodedState {
  const BlockCodec* codec = nullptr;  // null: this state has no codes
  uint8_t* codes;
  float* scales;

  FO_HD uint8_t* codes_of(int64_t block) const { return codes + block * (kBlock * codec->bits / 8); }
  FO_HD float* scales_of(int64_t block) const { return scales + block * codec->parts; }
};

// Steps the whole blocks among n elements from `start` of a row; returns how many elements that is.
// update(n, g, p, states): the rule on fp32 arrays.
template <class Rule, class Update>
static int64_t step_blocks(const Launch& launch, const Row& row, const Head& head, int64_t start, int64_t n, const Update& update) {
  constexpr int kStates = Rule::state_count, kRoom = kStates ? kStates : 1;
  alignas(64) float values[kRoom][2][kBlock], grads[kBlock], params[kBlock];
  float inverse[kRoom][2];
  CodedState coded[kRoom];
  for (int i = 0; i < kStates; ++i) {
    const int32_t format = launch.formats[i];
    if (!is_blockwise(format)) continue;
    coded[i].codec = &block_codec(format);
    coded[i].codes = reinterpret_cast<uint8_t*>(row[kState + i]) + start * code_bits(format) / 8;
    coded[i].scales = reinterpret_cast<float*>(row[kScale + i]) + start / block_size(format);
  }
  const int64_t blocks = n / kBlock;
  for (int64_t block = 0; block <= blocks; ++block) {
    const int now = block & 1;
    if (block < blocks) {
      const int64_t offset = start + block * kBlock;
      float* g = load_tile(row[kGrad], launch.grad_dtype, offset, kBlock, grads);
      float* p = load_param(launch, row, offset, kBlock, params);
      float* s[kMaxStates] = {};
      for (int i = 0; i < kStates; ++i) {
        s[i] = values[i][now];
        if (coded[i].codec) coded[i].codec->decode(coded[i].codes_of(block), coded[i].scales_of(block), s[i]);
        else s[i] = load_state(launch, row, i, offset, kBlock, s[i]);
      }
      update(kBlock, g, p, s);
      for (int i = 0; i < kStates; ++i) {
        if (!coded[i].codec) store_state(launch, row, head, i, offset, kBlock, s[i]);
      }
      store_param(launch, row, head, offset, kBlock, p);
    }
    for (int i = 0; i < kStates; ++i) {
      if (!coded[i].codec) continue;
      if (block > 0) coded[i].codec->encode(values[i][1 - now], inverse[i], coded[i].codes_of(block - 1));
      if (block < blocks) coded[i].codec->scale(values[i][now], coded[i].scales_of(block), inverse[i]);
    }
  }
  return blocks * kBlock;
}

}  // namespace fo
