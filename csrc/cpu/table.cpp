// What an instruction set offers: the steps of all rules, the norms, tensors of codes on their own, and matrices.
#include "history.h"
#include "isa.h"
#include "tile.h"

namespace fo {

void norm(const void* launch);  // reduce.cpp
void apply_matrix(const void* launch);
void project(const void* launch);
void square_sums(const void* launch);
void project_seeded(const void* launch);

#define FO_LIST(Type) void step_##Type(const void*);
#include "rules.inc"
#undef FO_LIST

#define FO_LIST(Type) step_##Type,
static void (*const steps[])(const void*) = {
#include "rules.inc"
};
#undef FO_LIST

FoDriver driver() {
  return {steps, norm, encode_tensor, decode_tensor, apply_matrix, project, square_sums, project_seeded,
          history_products, history_combine};
}

}  // namespace fo
