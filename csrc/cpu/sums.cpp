// Sums of squares of a matrix by row and by column in one read (Adafactor, arXiv 1804.04235), and one total with weights.
//
// 16 lanes per piece of a row and at most kSumRows rows per column add up in fp32, everything above them in double.
#include "matrix.h"
#include "parallel.h"
#include "reduce.h"
#include "tile.h"

#include <cstring>

namespace fo {

static void multiply(const float* __restrict x, float by, int n, float* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = x[i] * by;
}

static void add_squares(const float* __restrict x, int n, float* __restrict sum) {
  for (int i = 0; i < n; ++i) sum[i] += x[i] * x[i];
}

static void set_squares(const float* __restrict x, int n, float* __restrict sum) {
  for (int i = 0; i < n; ++i) sum[i] = x[i] * x[i];
}

static double weighted_squares(const float* __restrict x, const float* __restrict weight, int n) {
  typedef float Lanes __attribute__((vector_size(4 * kAccumulators)));
  Lanes sum = {}, v, w;
  int i = 0;
  for (; i + kAccumulators <= n; i += kAccumulators) {
    std::memcpy(&v, x + i, sizeof v);
    std::memcpy(&w, weight + i, sizeof w);
    sum += v * v * w;
  }
  double total = 0;
  for (int j = 0; j < kAccumulators; ++j) total += sum[j];
  for (; i < n; ++i) total += x[i] * x[i] * weight[i];
  return total;
}

// The rows of one chunk.
static void sum_chunk(const SumsLaunch& work, int64_t chunk) {
  const int64_t first = chunk * kSumRows, last = first + kSumRows < work.rows ? first + kSumRows : work.rows;
  const float mul = work.mul ? *work.mul : 1.f;
  alignas(64) float buffer[kTile], scaled[kTile];
  float* partial = work.col_out ? work.scratch + chunk * work.cols : nullptr;
  double total = 0;
  for (int64_t row = first; row < last; ++row) {
    double sum = 0;
    for (int64_t col = 0; col < work.cols; col += kTile) {
      const int n = int(work.cols - col < kTile ? work.cols - col : kTile);
      const float* g = load_tile(work.grad, work.grad_dtype, row * work.cols + col, n, buffer);
      if (work.total_out) {
        sum += weighted_squares(g, work.col_weight + col, n);
        continue;
      }
      if (work.mul) {
        multiply(g, mul, n, scaled);
        g = scaled;
      }
      if (work.row_out) {
        SquareSum piece;
        piece.add(g, n);
        sum += piece.total();
      }
      if (partial) (row == first ? set_squares : add_squares)(g, n, partial + col);
    }
    if (work.row_out) work.row_out[row] = float(sum);
    if (work.total_out) total += sum * work.row_weight[row];
  }
  if (work.total_out) std::memcpy(work.scratch + 2 * chunk, &total, sizeof total);
}

static void finish_columns(const SumsLaunch& work, int64_t chunks, int64_t first, int n) {
  double sum[kTile] = {};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const float* partial = work.scratch + chunk * work.cols + first;
    for (int i = 0; i < n; ++i) sum[i] += partial[i];
  }
  for (int i = 0; i < n; ++i) work.col_out[first + i] = float(sum[i]);
}

void square_sums(const void* data) {
  const SumsLaunch& work = *static_cast<const SumsLaunch*>(data);
  const int64_t chunks = (work.rows + kSumRows - 1) / kSumRows, tiles = (work.cols + kTile - 1) / kTile;
#pragma omp parallel num_threads(work.threads) if (work.threads > 1 && work.rows * work.cols > kSerialElements)
  {
    FlushSubnormals mode;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < chunks; ++i) sum_chunk(work, i);
    if (work.col_out) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < tiles; ++i) {
        finish_columns(work, chunks, i * kTile, int(work.cols - i * kTile < kTile ? work.cols - i * kTile : kTile));
      }
    }
  }
  if (!work.total_out) return;
  double all = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    double part;
    std::memcpy(&part, work.scratch + 2 * i, sizeof part);
    all += part;
  }
  *work.total_out = float(all);
}

}  // namespace fo
