// What an instruction set offers: the steps of all rules, the norms, and int8 blocks on their own.
#include "isa.h"
#include "parallel.h"
#include "tile.h"

namespace fo {

void norm(const void* launch);  // reduce.cpp

#define FO_LIST(Type) void step_##Type(const void*);
#include "rules.inc"
#undef FO_LIST

#define FO_LIST(Type) step_##Type,
static void (*const steps[])(const void*) = {
#include "rules.inc"
};
#undef FO_LIST

static void encode(const float* values, int64_t numel, bool is_signed, uint8_t* codes, float* scales) {
  FlushSubnormals mode;
  encode_int8(values, numel, is_signed, codes, scales);
}

static void decode(const uint8_t* codes, const float* scales, int64_t numel, bool is_signed, float* values) {
  FlushSubnormals mode;
  decode_int8(codes, scales, numel, is_signed, values);
}

FoDriver driver() { return {steps, norm, encode, decode}; }

}  // namespace fo
