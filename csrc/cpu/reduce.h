// Sums of squares: 16 fixed accumulators per grain, one partial sum per grain, then a serial sum in double.
// The order depends on the tensor alone, so a norm has the same bits for every thread count, chunk size and instruction set.
#pragma once
#include "../fusedopt.h"

namespace fo {

constexpr int kAccumulators = 16;

struct SquareSum {
  float lane[kAccumulators] = {};

  void add(const float* x, int n);  // x starts at a multiple of 16 elements of the grain
  void add_terms(const float* x, int n);  // the values themselves, in the same order
  float total() const;
};

// The largest element of a grain, with the same interface: of any order the same; NaN where one is NaN.
struct Largest {
  float lane[kAccumulators];

  Largest() { for (float& x : lane) x = nothing<true, float>(); }
  void add_terms(const float* x, int n);
  float total() const;
};

// Adds up the partial sums: per tensor into sums; a norm's gradients also into totals, the global norm and the clip coefficient.
void finish_sums(const Launch& launch);

// The same of partial maxima.
void finish_largest(const Launch& launch);

}  // namespace fo
