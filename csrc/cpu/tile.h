// Tiles: the fp32 view of a few hundred consecutive elements of a stream, in place or in a buffer in the first-level cache.
#pragma once
#include "../fusedopt.h"

namespace fo {

// Elements per tile where a stream needs decoding: AdamW's four buffers take 16 KB of a 32 or 48 KB first-level cache.
constexpr int kTile = 1024;
static_assert(kGrainSize % kTile == 0 && kTile % kBlock == 0, "tiles divide grains, blocks divide tiles");

// A tile as fp32: a pointer into the stream itself where that is fp32, otherwise `buffer`, filled. Offsets are in elements.
float* load_tile(int64_t address, int32_t dtype, int64_t offset, int n, float* buffer);
float* load_state(int64_t address, int64_t scale, int32_t format, int64_t offset, int n, float* buffer);

// Stores what was loaded that way; fp32 streams are up to date already.
void store_state(int64_t address, int64_t scale, int32_t format, int64_t offset, int n, const float* values);
void store_param(int64_t address, const Launch& launch, const Head& head, uint32_t tensor, int64_t offset, int n, const float* values);

// int8 codes and scales of formats.h. The streams start at a block; the last block may be short.
void decode_int8(const uint8_t* codes, const float* scales, int64_t n, bool is_signed, float* values);
void encode_int8(const float* values, int64_t n, bool is_signed, uint8_t* codes, float* scales);

}  // namespace fo
