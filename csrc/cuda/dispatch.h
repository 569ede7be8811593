// Runs a Launch by its rule id and phase, and the codecs: the entries that the Python module and the host shim share. Needs build/gen on the include path.
#pragma once
#include "../fusedopt.h"

const char* fo_cuda_norm(const fo::Launch& launch, void* stream);
// Device addresses; format: a Launch's format word. Null, or what is wrong.
const char* fo_cuda_encode(int64_t values, int dtype, int64_t numel, int format, int64_t codes, int64_t scales, void* stream);
const char* fo_cuda_decode(int64_t codes, int64_t scales, int64_t numel, int format, int64_t values, int dtype, void* stream);
// Sums of (mul * g)^2 of a row-major matrix by row and by column (fp32; an address 0 does not apply), and the sum of
// g_ij^2 row_weight_i col_weight_j. scratch: fo_cuda_sums_scratch() floats.
int64_t fo_cuda_sums_scratch(int64_t rows, int64_t cols);
const char* fo_cuda_row_col_sums(int64_t grad, int dtype, int64_t rows, int64_t cols, int64_t mul, int64_t row_out, int64_t col_out,
                                 int64_t scratch, void* stream);
const char* fo_cuda_weighted_square_sum(int64_t grad, int dtype, int64_t rows, int64_t cols, int64_t row_weight, int64_t col_weight,
                                        int64_t out, int64_t scratch, void* stream);

#if defined(FO_DISPATCH)
#include "rule_headers.inc"

#define FO_LIST(Type) const char* fo_cuda_##Type(const fo::Launch&, void*);
#include "rules.inc"
#undef FO_LIST

namespace fo {

using CudaStep = const char* (*)(const Launch&, void*);

#define FO_LIST(Type) {Type::name, Type::states, Type::scalars, int(Type::trust_on)},
constexpr RuleInfo kRules[] = {
#include "rules.inc"
};
#undef FO_LIST

#define FO_LIST(Type) fo_cuda_##Type,
constexpr CudaStep kSteps[] = {
#include "rules.inc"
};
#undef FO_LIST

constexpr int kRuleCount = int(sizeof(kRules) / sizeof(kRules[0]));

// Enqueues one launch; null, or what is wrong.
inline const char* cuda_launch(const Launch& launch, void* stream) {
  if (launch.bytes != int32_t(sizeof launch)) return "the layout of this Launch is another version's";
  if (launch.rule < 0 || launch.rule >= kRuleCount) return "no such rule: see describe()";
  if (launch.phase < kFused || launch.phase > kDirection) return "no such phase";
  if (launch.chunk <= 0 || launch.chunk % kGrainSize != 0 || launch.chunk > (int64_t(1) << 28)) return "chunk is no multiple of the grain size, or beyond 2^28";
  if (launch.n_chunks > 0x7FFFFFFF) return "more chunks than a grid has blocks";
  if (launch.phase == kNorm) return fo_cuda_norm(launch, stream);
  return launch.n_chunks > 0 ? kSteps[launch.rule](launch, stream) : nullptr;
}

}  // namespace fo
#endif
