// Norms of a launch's tensors (phase kNorm), and the sums that probes share with them.
#include "reduce.h"

#include "../stages.h"
#include "parallel.h"
#include "tile.h"

namespace fo {

void SquareSum::add(const float* x, int n) {
  typedef float Lanes __attribute__((vector_size(4 * kAccumulators)));
  Lanes sum, v;
  std::memcpy(&sum, lane, sizeof sum);
  int i = 0;
  for (; i + kAccumulators <= n; i += kAccumulators) {
    std::memcpy(&v, x + i, sizeof v);
    sum += v * v;
  }
  v = Lanes{};
  std::memcpy(&v, x + i, size_t(n - i) * sizeof(float));
  sum += v * v;
  std::memcpy(lane, &sum, sizeof sum);
}

void SquareSum::add_terms(const float* x, int n) {
  typedef float Lanes __attribute__((vector_size(4 * kAccumulators)));
  Lanes sum, v;
  std::memcpy(&sum, lane, sizeof sum);
  int i = 0;
  for (; i + kAccumulators <= n; i += kAccumulators) {
    std::memcpy(&v, x + i, sizeof v);
    sum += v;
  }
  v = Lanes{};
  std::memcpy(&v, x + i, size_t(n - i) * sizeof(float));
  sum += v;
  std::memcpy(lane, &sum, sizeof sum);
}

float SquareSum::total() const {
  double sum = 0;
  for (float x : lane) sum += x;
  return float(sum);
}

void Largest::add_terms(const float* x, int n) {
  for (int i = 0; i < n; ++i) lane[i % kAccumulators] = join<true>(lane[i % kAccumulators], x[i]);
}

float Largest::total() const {
  float most = lane[0];
  for (float x : lane) most = join<true>(most, x);
  return most;
}

void finish_largest(const Launch& launch) {
  for (int64_t r = 0; r < launch.rows; ++r) {
    const Row row(launch, r);
    const float* partial = launch.partials + 2 * row[kGrain];
    const int64_t grains = (row[kNumel] + kGrainSize - 1) / kGrainSize;
    for (int side = 0; side < 2; ++side) {
      float most = nothing<true, float>();
      for (int64_t i = 0; i < grains; ++i) most = join<true>(most, partial[2 * i + side]);
      launch.sums[2 * row.tensor() + side] = most;
    }
  }
}

void finish_sums(const Launch& launch) {
  double total = 0;
  for (int64_t r = 0; r < launch.rows; ++r) {
    const Row row(launch, r);
    const float* partial = launch.partials + 2 * row[kGrain];
    const int64_t grains = (row[kNumel] + kGrainSize - 1) / kGrainSize;
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
  if (launch.phase != kNorm || !launch.totals) return;
  launch.totals[launch.total_index] = float(total);
  if (launch.total_index != launch.total_count - 1) return;
  double sum = 0;
  for (int i = 0; i < launch.total_count; ++i) sum += launch.totals[i];
  const float norm = float(std::sqrt(sum) / (launch.grad_scale ? double(*launch.grad_scale) : 1.0));
  if (launch.norm) *launch.norm = norm;
  if (launch.clip && launch.max_norm > 0.f) *launch.clip = clip_coefficient(norm, launch.max_norm);
}

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

void norm(const void* data) {
  const Launch& launch = *static_cast<const Launch*>(data);
  for_chunks(launch, norm_chunk);
  finish_sums(launch);
}

}  // namespace fo
