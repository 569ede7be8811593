// Loads and stores of tiles: 16-bit floats, rounded to nearest or stochastically, weights with a companion, and coded states.
// Loops vectorised by the compiler.
#include "tile.h"

#include "../gauss.h"
#include "../precision.h"
#include "codec.h"
#include "random.h"

namespace fo {

static_assert(kFormatF32 == int(kF32) && kFormatBF16 == int(kBF16), "unscaled formats share the codes of their dtypes");

template <class T>
static T* at(int64_t address, int64_t offset) { return reinterpret_cast<T*>(address) + offset; }

static void load_bf16(const uint16_t* __restrict x, int n, float* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = bf16_to_float(x[i]);
}

static void load_f16(const uint16_t* __restrict x, int n, float* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = f16_to_float(x[i]);
}

static void store_bf16(const float* __restrict x, int n, uint16_t* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = float_to_bf16(x[i]);
}

static void store_f16(const float* __restrict x, int n, uint16_t* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = float_to_f16(x[i]);
}

static void store_bf16_stochastic(const float* __restrict x, const uint16_t* __restrict random, int n, uint16_t* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = float_to_bf16_stochastic(x[i], random[i]);
}

static void store_f16_stochastic(const float* __restrict x, const uint16_t* __restrict random, int n, uint16_t* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = float_to_f16_stochastic(x[i], random[i]);
}

template <class Low>
static void load_split(const uint16_t* __restrict high, const Low* __restrict low, int n, float* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = join(high[i], int32_t(low[i]) * (sizeof(Low) == 1 ? 256 : 1));
}

static void store_split32(const float* __restrict x, int n, uint16_t* __restrict high, int16_t* __restrict low) {
  for (int i = 0; i < n; ++i) {
    const Split split = split32(x[i]);
    high[i] = split.high;
    low[i] = split.low;
  }
}

static void store_split24(const float* __restrict x, const uint16_t* __restrict random, int n, uint16_t* __restrict high,
                          int8_t* __restrict low) {
  for (int i = 0; i < n; ++i) {
    const Split split = split24(x[i], random[i]);
    high[i] = split.high;
    low[i] = int8_t(split.low);
  }
}

static void load_tile16(const uint16_t* x, int32_t dtype, int n, float* out) {
  if (dtype == kBF16) load_bf16(x, n, out);
  else load_f16(x, n, out);
}

static void store_tile16(const float* x, int32_t dtype, int n, uint16_t* out) {
  if (dtype == kBF16) store_bf16(x, n, out);
  else store_f16(x, n, out);
}

static void store_tile16_stochastic(const float* x, int32_t dtype, const uint16_t* random, int n, uint16_t* out) {
  if (dtype == kBF16) store_bf16_stochastic(x, random, n, out);
  else store_f16_stochastic(x, random, n, out);
}

float* load_tile(int64_t address, int32_t dtype, int64_t offset, int n, float* buffer) {
  if (dtype == kF32) return at<float>(address, offset);
  load_tile16(at<uint16_t>(address, offset), dtype, n, buffer);
  return buffer;
}

static void add(const float* __restrict x, int n, float* __restrict sum) {
  for (int i = 0; i < n; ++i) sum[i] += x[i];
}

static void subtract_rounded(const float* __restrict x, int n, float* __restrict rounded) {
  for (int i = 0; i < n; ++i) rounded[i] = remainder(x[i], rounded[i]);
}

float* load_param(const Launch& launch, const Row& row, int64_t offset, int n, float* buffer) {
  const int64_t companion = row[kCompanion];
  if (launch.phase == kDirection) {
    std::memset(buffer, 0, n * sizeof(float));
    return buffer;
  }
  if (launch.param_dtype == kF32) return at<float>(row[kParam], offset);
  const uint16_t* p = at<uint16_t>(row[kParam], offset);
  switch (launch.precision) {
    case kMaster:
      return at<float>(companion, offset);
    case kSplit24:
      load_split(p, at<int8_t>(companion, offset), n, buffer);
      return buffer;
    case kSplit32:
      load_split(p, at<int16_t>(companion, offset), n, buffer);
      return buffer;
    case kKahan: {
      float rest[kTile];
      load_tile16(p, launch.param_dtype, n, buffer);
      load_tile16(at<uint16_t>(companion, offset), launch.param_dtype, n, rest);
      add(rest, n, buffer);
      return buffer;
    }
    default:
      load_tile16(p, launch.param_dtype, n, buffer);
      return buffer;
  }
}

void store_param(const Launch& launch, const Row& row, const Head& head, int64_t offset, int n, const float* values) {
  const int32_t dtype = launch.param_dtype;
  if (dtype == kF32) {
    if (launch.phase == kDirection) std::memcpy(at<float>(row[kParam], offset), values, n * sizeof(float));
    return;
  }
  const int64_t companion = row[kCompanion];
  uint16_t* p = at<uint16_t>(row[kParam], offset);
  uint16_t bits[kTile + kBlock];
  const int early = int(offset % kBlock);  // rows of a matrix may start anywhere, random bits do at a block
  const uint16_t* random = bits + early;
  if (launch.precision == kStochastic || launch.precision == kKahan || launch.precision == kSplit24) {
    random_bits(head, uint32_t(row.tensor()), 0, 8 * row[kFirstOctet] + offset - early, n + early, bits);
  }
  switch (launch.precision) {
    case kStochastic:
      return store_tile16_stochastic(values, dtype, random, n, p);
    case kSplit24:
      return store_split24(values, random, n, p, at<int8_t>(companion, offset));
    case kSplit32:
      return store_split32(values, n, p, at<int16_t>(companion, offset));
    case kKahan: {
      float rest[kTile];
      store_tile16(values, dtype, n, p);
      load_tile16(p, dtype, n, rest);
      subtract_rounded(values, n, rest);
      return store_tile16_stochastic(rest, dtype, random, n, at<uint16_t>(companion, offset));
    }
    default:  // nearest, and the rounded copy of a master weight
      return store_tile16(values, dtype, n, p);
  }
}

float* load_state(const Launch& launch, const Row& row, int i, int64_t offset, int n, float* buffer) {
  const int32_t format = launch.formats[i];
  const int32_t dtype = (format & kFormatMask) == kFormatF32 ? kF32 : kBF16;
  if (!is_blockwise(format)) return load_tile(row[kState + i], dtype, offset, n, buffer);
  decode_blocks(format, at<uint8_t>(row[kState + i], offset * code_bits(format) / 8),
                at<float>(row[kScale + i], offset / block_size(format)), n, buffer);
  return buffer;
}

void store_state(const Launch& launch, const Row& row, const Head& head, int i, int64_t offset, int n, const float* values) {
  const int32_t format = launch.formats[i], id = format & kFormatMask;
  if (id == kFormatF32) return;
  if (is_blockwise(format)) {
    return encode_blocks(format, values, n, at<uint8_t>(row[kState + i], offset * code_bits(format) / 8),
                         at<float>(row[kScale + i], offset / block_size(format)));
  }
  uint16_t* out = at<uint16_t>(row[kState + i], offset);
  if (id == kFormatBF16) return store_bf16(values, n, out);
  uint16_t random[kTile];
  random_bits(head, uint32_t(row.tensor()), 1 + i, 8 * row[kFirstOctet] + offset, n, random);
  store_bf16_stochastic(values, random, n, out);
}

void draw_noise(const Row& row, const Head& head, int64_t offset, int n, float* out) {
  alignas(64) uint16_t random[kTile];
  random_bits(head, uint32_t(row.tensor()), kNoiseStream, 8 * row[kFirstOctet] + offset, n, random);
  for (int i = 0; i < (n + 1) / 2; ++i) {
    const Pair pair = normal_pair(random[2 * i], random[2 * i + 1]);
    out[2 * i] = pair.first;
    out[2 * i + 1] = pair.second;
  }
}

// Calls body(first, count) for tiles of a tensor. A share of 16 tiles keeps the prefetchers' streams long.
template <class Body>
static void for_tiles(int64_t numel, int32_t threads, const Body& body) {
  const int64_t tiles = (numel + kTile - 1) / kTile;
#pragma omp parallel num_threads(threads) if (threads > 1 && numel > kSerialElements)
  {
    FlushSubnormals mode;
#pragma omp for schedule(dynamic, 16)
    for (int64_t i = 0; i < tiles; ++i) body(i * kTile, int(numel - i * kTile < kTile ? numel - i * kTile : kTile));
  }
}

void encode_tensor(const void* values, int32_t dtype, int64_t numel, int32_t format, uint8_t* codes, float* scales,
                   int32_t threads) {
  for_tiles(numel, threads, [&](int64_t first, int n) {
    alignas(64) float buffer[kTile];
    const float* x = load_tile(reinterpret_cast<int64_t>(values), dtype, first, n, buffer);
    encode_blocks(format, x, n, codes + first * code_bits(format) / 8, scales + first / block_size(format));
  });
}

void decode_tensor(const uint8_t* codes, const float* scales, int64_t numel, int32_t format, void* values, int32_t dtype,
                   int32_t threads) {
  for_tiles(numel, threads, [&](int64_t first, int n) {
    alignas(64) float buffer[kTile];
    float* out = dtype == kF32 ? static_cast<float*>(values) + first : buffer;
    decode_blocks(format, codes + first * code_bits(format) / 8, scales + first / block_size(format), n, out);
    if (dtype != kF32) store_tile16(out, dtype, n, static_cast<uint16_t*>(values) + first);
  });
}

}  // namespace fo
