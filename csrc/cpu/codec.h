// Blocks of the coded state formats: 256 values at a time, which is one block, or two of int4.
#pragma once
#include "../formats.h"

namespace fo {

struct BlockCodec {
  void (*decode)(const uint8_t* codes, const float* scales, float* values);
  void (*encode)(const float* values, const float* inverses, uint8_t* codes);  // finite values
  void (*scale)(float* values, float* scales, float* inverses);  // makes the values finite
  int parts;  // scales in 256 values
  int bits;   // per code
};

// Addresses are multiples of the size of an element, no more.
const BlockCodec& block_codec(int32_t format);

// n values of a stream that starts at a block; the last block may be short. The values of `encode` stay as they are.
void decode_blocks(int32_t format, const uint8_t* codes, const float* scales, int64_t n, float* values);
void encode_blocks(int32_t format, const float* values, int64_t n, uint8_t* codes, float* scales);

}  // namespace fo
