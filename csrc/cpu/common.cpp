// What an instruction set offers: the steps of all rules, the norms of a launch, and int8 blocks on their own.
#include "isa.h"
#include "reduce.h"
#include "tile.h"

namespace fo {

// |p|^2 is read only where someone takes it from sums: the global norm alone is one read of the gradients.
static void norm_chunk(const Launch& launch, int64_t chunk) {
  const Row row(launch, chunk >> 32);
  const int64_t start = (chunk & 0xFFFFFFFF) * launch.chunk, left = row[kNumel] - start;
  const int64_t n = left < launch.chunk ? left : launch.chunk;
  alignas(64) float buffer[kTile];
  SquareSum param_sum, grad_sum;
  for (int64_t done = 0; done < n; done += kTile) {
    const int64_t offset = start + done;
    const int count = int(n - done < kTile ? n - done : kTile);
    if (launch.sums) param_sum.add(load_tile(row[kParam], launch.param_dtype, offset, count, buffer), count);
    grad_sum.add(load_tile(row[kGrad], launch.grad_dtype, offset, count, buffer), count);
    if ((offset + count) % kGrainSize == 0 || done + count == n) {
      float* partial = launch.partials + 2 * (row[kGrain] + offset / kGrainSize);
      partial[0] = param_sum.total();
      partial[1] = grad_sum.total();
      param_sum = grad_sum = {};
    }
  }
}

static void norm(const void* data) {
  const Launch& launch = *static_cast<const Launch*>(data);
  for_chunks(launch, norm_chunk);
  finish_sums(launch, true);
}

static void encode(const float* values, int64_t numel, bool is_signed, uint8_t* codes, float* scales) {
  FlushSubnormals mode;
  encode_int8(values, numel, is_signed, codes, scales);
}

static void decode(const uint8_t* codes, const float* scales, int64_t numel, bool is_signed, float* values) {
  FlushSubnormals mode;
  decode_int8(codes, scales, numel, is_signed, values);
}

#define FO_LIST(Type) void step_##Type(const void*);
#include "rules.inc"
#undef FO_LIST

#define FO_LIST(Type) step_##Type,
static void (*const steps[])(const void*) = {
#include "rules.inc"
};
#undef FO_LIST

FoDriver driver() { return {steps, norm, encode, decode}; }

}  // namespace fo
