// Instruction sets of the CPU drivers: the codes of Launch.isa, and what each one offers from its own namespace.
//
// The same headers are compiled once per instruction set with `-Dfo=fo_<isa>`, which renames namespace fo. No inline function
// of one set can then stand in for another's at link time, where a baseline machine would meet AVX-512 code.
#pragma once
#include <cstdint>

enum FoIsa : int32_t { kIsaBaseline = 0, kIsaAvx2 = 1, kIsaAvx512 = 2, kIsaCount = 3 };

// Launches come as addresses of fo::Launch, a type of another name in every namespace.
struct FoDriver {
  void (*const* steps)(const void* launch);  // by rule id
  void (*norm)(const void* launch);
  void (*encode)(const void* values, int32_t dtype, int64_t numel, int32_t format, uint8_t* codes, float* scales, int32_t threads);
  void (*decode)(const uint8_t* codes, const float* scales, int64_t numel, int32_t format, void* values, int32_t dtype,
                 int32_t threads);
  // The structs of matrix.h.
  void (*apply_matrix)(const void* launch);
  void (*project)(const void* launch);
  void (*square_sums)(const void* launch);
  void (*project_seeded)(const void* launch);
  // Of a History (history.h).
  void (*history_products)(const void* history, int64_t place, double* part);
  void (*history_combine)(const void* history, const double* y, float* out);
};

namespace fo_baseline { FoDriver driver(); }
namespace fo_avx2 { FoDriver driver(); }
namespace fo_avx512 { FoDriver driver(); }
