// The ABI between the Python plan and the native drivers: enums, table columns, scalar rows, Launch, and the macros a rule uses.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define FO_HD __host__ __device__ __forceinline__
#else
#define FO_HD inline __attribute__((always_inline))
#endif

namespace fo {

enum DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };
enum FormatId : int32_t {
  kFormatF32 = 0, kFormatBF16 = 1, kFormatInt8 = 2, kFormatInt8c = 3, kFormatFp8 = 4, kFormatInt4 = 5,
  kFormatBF16Stochastic = 6,  // stored like bf16, rounded with random bits of stream 1 + i for state i
};
constexpr int32_t kFormatMask = 0xFF, kFormatSigned = 0x100;  // a Launch's format word: FormatId, plus the sign flag of the map
// How a 16-bit parameter is kept (precision.h). From kKahan on it has a companion; Python never asks for those with fp32 parameters.
enum Precision : int32_t { kNearest = 0, kStochastic = 1, kKahan = 2, kSplit24 = 3, kSplit32 = 4, kMaster = 5 };
enum Phase : int32_t {
  kFused = 0,  // prologue, direction, epilogue, stores
  kProbe = 1,  // the same arithmetic with stores disabled: accumulates |p|^2 and |u|^2 of each tensor, or the rule's own two terms,
               // or takes the largest of each of them
  kApply = 2,  // kFused with the update scaled by rule.trust() of the probe's sums
  kNorm = 3,   // |p|^2 and |g|^2 of each tensor and the global gradient norm; reads only
  kDirection = 4,  // the update u is stored in place of the parameter, which is not read and counts as 0: no lr, no decay (projections)
};
enum class Trust : int32_t { none, gradient, update };  // what rule.trust() scales: (g + l2 p), or the update u

// Table of rows (one row a tensor), stored column by column: entry = table[column * rows + row]. All addresses are device addresses.
enum Column : int32_t {
  kGrad = 0,      // the only column that changes from step to step
  kParam = 1,
  kState = 2,     // kState + i: state i
  kScale = 6,     // kScale + i: fp32 scale per block of state i, 0 where the format has none
  kNumel = 10,
  kMeta = 11,     // tensor id << 32 | scalar row
  kGrain = 12,    // index of the tensor's first entry in the partial sums (one entry per kGrainSize elements)
  kCompanion = 13,  // Kahan compensation (the parameter's dtype), low bits (int8, int16) or master weight (fp32); 0 where there is none
  kFirstOctet = 14,  // where a row's random bits begin: eighths of the elements before it, of the tensor that it is a shard of
  kColumns = 15,
};

constexpr int kMaxStates = 4;
constexpr int kBlock = 256;         // elements that share one scale, and the unit of work of the drivers
constexpr int kHalfBlock = 128;     // the same for int4
constexpr int kGrainSize = 2048;    // elements that share one partial sum: fixed, so norms do not depend on the chunk size
constexpr int kScalarStride = 32;   // 32-bit words per scalar row: the stage head, then the rule's scalars
constexpr int kScalarHead = 8;

// Head of a scalar row: the numbers of the stages, the same for every rule. grad_sign is -1 with maximize=True.
struct Head {
  float lr, decay /* lr * decoupled weight decay */, l2 /* coupled weight decay */, grad_sign;
  uint32_t seed_lo, seed_hi, step, reserved;
};
static_assert(sizeof(Head) == kScalarHead * 4, "the head is 8 words");

// A chunk is `chunk` consecutive elements of one row (a multiple of kGrainSize; the last may be short): row << 32 | index in the row.
// Pointers that do not apply are null. Python packs this struct field by field (fusedopt/abi.py); `bytes` guards the layout.
struct Launch {
  const int64_t* table;
  const int64_t* chunks;
  const float* scalars;      // [scalar rows, kScalarStride]
  const float* grad_scale;   // loss scale to divide gradients by (GradScaler)
  const float* found_inf;    // non-zero: nothing may be written
  float* clip;               // coefficient for the gradients: written by the last kNorm launch, read by the others
  float* partials;           // [grains, 2]
  float* sums;               // [tensor ids, 2]: |p|^2 and |g|^2 (kNorm; g as stored) or |u|^2 (kProbe), or of the rule's terms
  float* totals;             // [kNorm launches]: sum of |g|^2 over a launch's tensors
  float* norm;               // global gradient norm after unscaling
  int32_t* counters;         // [rows + 1] zeros, left zero: chunks finished per row, then rows finished (GPU only)
  int64_t rows, n_chunks, chunk, grains;
  float max_norm;            // <= 0: norms only, no clip coefficient
  int32_t rule, phase, param_dtype, grad_dtype, precision, formats[kMaxStates];
  int32_t aligned;           // every address is a multiple of 16 bytes
  int32_t total_index, total_count;  // kNorm: this launch's entry in totals; when it is the last, it combines total_count entries
  int32_t threads;           // CPU threads
  int32_t isa;               // CPU instruction set (cpu/isa.h)
  int32_t bytes;             // sizeof(Launch)
};

constexpr int count_names(const char* text) {
  int n = 0;
  bool word = false;
  for (; *text; ++text) {
    if (*text == ',' || *text == ' ') word = false;
    else if (!word) { word = true; ++n; }
  }
  return n;
}

struct Pair { float first, second; };

// How a probe joins what two parts of a tensor gave: their sum, or the larger (NaN where one is).
template <bool Largest, class T>
FO_HD T join(T a, T b) {
  if constexpr (Largest) return b > a || b != b ? b : a;
  else return a + b;
}

template <bool Largest>
FO_HD Pair join(Pair a, Pair b) {
  return {join<Largest>(a.first, b.first), join<Largest>(a.second, b.second)};
}

template <bool Largest, class T>
constexpr T nothing() {  // what a join begins with
  if constexpr (Largest) return -__builtin_huge_valf();
  else return T(0);
}

// What a rule inherits; a rule overrides by redeclaring.
struct Elementwise {
  static constexpr Trust trust_on = Trust::none;
};

struct RuleInfo {
  const char *name, *states, *scalars;
  int trust_on;
};

}  // namespace fo

#define FO_NAME(text) static constexpr const char* name = text;
#define FO_STATES(...)                                   \
  static constexpr const char* states = "" #__VA_ARGS__; \
  static constexpr int state_count = fo::count_names("" #__VA_ARGS__);
#define FO_SCALARS(...)                                   \
  struct Scalars { float __VA_ARGS__; };                  \
  static constexpr const char* scalars = "" #__VA_ARGS__; \
  static_assert(sizeof(Scalars) <= 4 * (fo::kScalarStride - fo::kScalarHead), "too many scalars for a row");
// Ends a rule's header; the build finds rules by this line (setup.py).
#define FO_RULE(Type) static_assert(fo::Type::state_count <= fo::kMaxStates, "too many states");
