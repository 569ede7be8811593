// What an instruction set offers: the steps of all rules, the norms, and tensors of codes on their own.
#include "isa.h"
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

FoDriver driver() { return {steps, norm, encode_tensor, decode_tensor}; }

}  // namespace fo
