// Sums of squares: 16 fixed accumulators per grain, one partial sum per grain, then a serial sum in double.
// The order depends on the tensor alone, so a norm has the same bits for every thread count, chunk size and instruction set.
#pragma once
#include "../stages.h"
#include "parallel.h"

#include <cmath>
#include <cstring>

namespace fo {

constexpr int kAccumulators = 16;

struct SquareSum {
  float lane[kAccumulators] = {};

  // `x` starts at a multiple of 16 elements of the grain
  __attribute__((noinline)) void add(const float* __restrict x, int n) {
    typedef float Lanes __attribute__((vector_size(4 * kAccumulators)));
    Lanes sum;
    std::memcpy(&sum, lane, sizeof sum);
    int i = 0;
    for (; i + kAccumulators <= n; i += kAccumulators) {
      Lanes v;
      std::memcpy(&v, x + i, sizeof v);
      sum += v * v;
    }
    std::memcpy(lane, &sum, sizeof sum);
    for (int k = 0; i < n; ++i, ++k) lane[k] += x[i] * x[i];
  }

  float total() const {
    double sum = 0;
    for (float x : lane) sum += x;
    return float(sum);
  }
};

// Adds up the partial sums: tensors in sums, and for the gradients the launch's total, the global norm and the clip coefficient.
static inline void finish_sums(const Launch& launch, bool is_norm) {
  double total = 0;
  for (int64_t r = 0; r < launch.rows; ++r) {
    Row row(launch, r);
    const float* partial = launch.partials + 2 * row[kGrain];
    int64_t grains = (row[kNumel] + kGrainSize - 1) / kGrainSize;
    double param = 0, other = 0;
    for (int64_t i = 0; i < grains; ++i) {
      param += partial[2 * i];
      other += partial[2 * i + 1];
    }
    if (launch.sums) {
      launch.sums[2 * row.tensor()] = float(param);
      launch.sums[2 * row.tensor() + 1] = float(other);
    }
    total += other;
  }
  if (!is_norm || !launch.totals) return;
  launch.totals[launch.total_index] = float(total);
  if (launch.total_index != launch.total_count - 1) return;
  double sum = 0;
  for (int i = 0; i < launch.total_count; ++i) sum += launch.totals[i];
  float norm = float(std::sqrt(sum) / (launch.grad_scale ? double(*launch.grad_scale) : 1.0));
  if (launch.norm) *launch.norm = norm;
  if (launch.clip && launch.max_norm > 0.f) *launch.clip = clip_coefficient(norm, launch.max_norm);
}

}  // namespace fo
