// Tiles: the fp32 view of a few hundred consecutive elements of a stream, in place or in a buffer in the first-level cache.
#pragma once
#include "../fusedopt.h"
#include "parallel.h"

namespace fo {

constexpr int kTile = 1024;  // elements per tile at most, and of the tiles that probes and norms take
static_assert(kGrainSize % kTile == 0 && kTile % kBlock == 0, "tiles divide grains, blocks divide tiles");

// A tile as fp32: a pointer into the stream itself where that is fp32, otherwise `buffer`, filled. Offsets are in elements.
float* load_tile(int64_t address, int32_t dtype, int64_t offset, int n, float* buffer);

// The weights that the parameter and its companion stand for. They lie in place in fp32 parameters and master weights.
float* load_param(const Launch& launch, const Row& row, int64_t offset, int n, float* buffer);
// State i, whose tiles start at a block.
float* load_state(const Launch& launch, const Row& row, int i, int64_t offset, int n, float* buffer);

// The noise of a rule that takes it, for n elements from a multiple of 256 on. `out` has room for a multiple of 256.
void draw_noise(const Row& row, const Head& head, int64_t offset, int n, float* out);

// Stores what was loaded that way; fp32 streams are up to date already.
void store_param(const Launch& launch, const Row& row, const Head& head, int64_t offset, int n, const float* values);
void store_state(const Launch& launch, const Row& row, const Head& head, int i, int64_t offset, int n, const float* values);

// A flat tensor of any dtype into codes and back.
void encode_tensor(const void* values, int32_t dtype, int64_t numel, int32_t format, uint8_t* codes, float* scales,
                   int32_t threads);
void decode_tensor(const uint8_t* codes, const float* scales, int64_t numel, int32_t format, void* values, int32_t dtype,
                   int32_t threads);

}  // namespace fo
