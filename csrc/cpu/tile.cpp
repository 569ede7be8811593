// Loads and stores of tiles: 16-bit floats, rounded to nearest or stochastically, and int8 blocks. Loops vectorised by the compiler.
#include "tile.h"

#include "../precision.h"
#include "random.h"

namespace fo {

static_assert(kFormatF32 == int(kF32) && kFormatBF16 == int(kBF16), "unscaled formats share the codes of their dtypes");

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

float* load_tile(int64_t address, int32_t dtype, int64_t offset, int n, float* buffer) {
  if (dtype == kF32) return reinterpret_cast<float*>(address) + offset;
  auto* halves = reinterpret_cast<const uint16_t*>(address) + offset;
  if (dtype == kBF16) load_bf16(halves, n, buffer);
  else load_f16(halves, n, buffer);
  return buffer;
}

float* load_state(int64_t address, int64_t scale, int32_t format, int64_t offset, int n, float* buffer) {
  if ((format & kFormatMask) != kFormatInt8) return load_tile(address, format & kFormatMask, offset, n, buffer);
  decode_int8(reinterpret_cast<const uint8_t*>(address) + offset, reinterpret_cast<const float*>(scale) + offset / kBlock, n,
              format & kFormatSigned, buffer);
  return buffer;
}

void store_state(int64_t address, int64_t scale, int32_t format, int64_t offset, int n, const float* values) {
  if ((format & kFormatMask) == kFormatInt8) {
    encode_int8(values, n, format & kFormatSigned, reinterpret_cast<uint8_t*>(address) + offset,
                reinterpret_cast<float*>(scale) + offset / kBlock);
  } else if ((format & kFormatMask) == kFormatBF16) {
    store_bf16(values, n, reinterpret_cast<uint16_t*>(address) + offset);
  }
}

void store_param(int64_t address, const Launch& launch, const Head& head, uint32_t tensor, int64_t offset, int n, const float* values) {
  if (launch.param_dtype == kF32) return;
  auto* out = reinterpret_cast<uint16_t*>(address) + offset;
  if (launch.precision == kStochastic) {
    uint16_t random[kTile];
    random_bits(head, tensor, offset, n, random);
    if (launch.param_dtype == kBF16) store_bf16_stochastic(values, random, n, out);
    else store_f16_stochastic(values, random, n, out);
  } else if (launch.param_dtype == kBF16) {
    store_bf16(values, n, out);
  } else {
    store_f16(values, n, out);
  }
}

}  // namespace fo
