// The projection of a gradient with random numbers from a seed, and its squares, in one read: APOLLO and APOLLO-Mini (arXiv
// 2412.05270). The numbers are drawn once per call by all threads; rank 1 is a weighted sum of rows or of columns.
#include "normal.h"
#include "parallel.h"
#include "project.h"
#include "reduce.h"
#include "tile.h"

#include "../precision.h"

#include <cstring>

namespace fo {

// The projector [rank, depth], rounded to a dtype and stored in another.
static void draw_projector(const SeededLaunch& work, int64_t depth, int32_t dtype, int32_t rounded, void* to) {
  const ProjectorSeed key = {work.seed, uint32_t(work.tensor_id), work.step, work.rank};
  const int64_t pieces = (depth + kNormals - 1) / kNormals;
#pragma omp parallel num_threads(work.threads) if (work.threads > 1 && work.rank * depth > kSerialElements)
  {
    FlushSubnormals mode;
    alignas(64) float numbers[kNormals];
#pragma omp for schedule(static)
    for (int64_t i = 0; i < work.rank * pieces; ++i) {
      const int64_t component = i / pieces, first = i % pieces * kNormals;
      draw_normals(key, component, first, rounded, numbers);
      store_result(numbers, depth - first < kNormals ? depth - first : kNormals, dtype, to, component * depth + first);
    }
  }
}

static FO_HD float widened(float x) { return x; }
static FO_HD float widened(uint16_t x) { return bf16_to_float(x); }

// sum += a weighted sum of four rows, `stride` apart, or of one; squares likewise. bf16 is widened here: through buffers, a step
// of rank 1 takes twice as long.
template <class T>
static void add_rows(const T* __restrict a, int64_t stride, const float* weight, int n, float* __restrict sum,
                     float* __restrict squares) {
  const T *__restrict b = a + stride, *__restrict c = b + stride, *__restrict d = c + stride;
  for (int i = 0; i < n; ++i) {
    const float w = widened(a[i]), x = widened(b[i]), y = widened(c[i]), z = widened(d[i]);
    sum[i] += (weight[0] * w + weight[1] * x) + (weight[2] * y + weight[3] * z);
    squares[i] += (w * w + x * x) + (y * y + z * z);
  }
}

template <class T>
static void add_row(const T* __restrict a, float weight, int n, float* __restrict sum, float* __restrict squares) {
  for (int i = 0; i < n; ++i) {
    const float w = widened(a[i]);
    sum[i] += weight * w;
    squares[i] += w * w;
  }
}

// Rows of a tile, `stride` apart, weighted, to a sum and a sum of squares per column.
template <class T>
static void sum_tile(const T* g, int64_t stride, const float* weight, int64_t rows, int n, float* sums, float* squares) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) add_rows(g + row * stride, stride, weight + row, n, sums, squares);
  for (; row < rows; ++row) add_row(g + row * stride, weight[row], n, sums, squares);
}

// The rows of one chunk.
static void sum_rows(const SeededLaunch& work, const float* weight, int64_t first, int64_t last, float* sums, float* squares) {
  alignas(64) float buffer[4 * kTile];
  for (int64_t col = 0; col < work.cols; col += kTile, sums += kTile, squares += kTile) {
    const int n = int(work.cols - col < kTile ? work.cols - col : kTile);
    const int64_t offset = first * work.cols + col;
    std::memset(sums, 0, size_t(n) * 4);
    std::memset(squares, 0, size_t(n) * 4);
    if (work.grad_dtype == kF32) {
      sum_tile(reinterpret_cast<const float*>(work.grad) + offset, work.cols, weight + first, last - first, n, sums, squares);
    } else if (work.grad_dtype == kBF16) {
      sum_tile(reinterpret_cast<const uint16_t*>(work.grad) + offset, work.cols, weight + first, last - first, n, sums, squares);
    } else {
      for (int64_t row = first; row < last; row += 4) {
        const int64_t some = last - row < 4 ? last - row : 4;
        for (int64_t i = 0; i < some; ++i) load_tile(work.grad, kF16, (row + i) * work.cols + col, n, buffer + i * kTile);
        sum_tile(buffer, kTile, weight + row, some, n, sums, squares);
      }
    }
  }
}

static void add_chunks(const float* partial, int64_t stride, int64_t chunks, int n, float* out) {
  double sum[kTile] = {};
  for (int64_t chunk = 0; chunk < chunks; ++chunk, partial += stride) {
    for (int i = 0; i < n; ++i) sum[i] += partial[i];
  }
  for (int i = 0; i < n; ++i) out[i] = float(sum[i]);
}

static void project_down(const SeededLaunch& work, const float* weight, float* partials) {
  const int64_t chunks = (work.rows + kSumRows - 1) / kSumRows, tiles = (work.cols + kTile - 1) / kTile;
  float* squares = partials + chunks * work.cols;
#pragma omp parallel num_threads(work.threads) if (work.threads > 1 && work.rows * work.cols > kSerialElements)
  {
    FlushSubnormals mode;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t first = i * kSumRows, last = first + kSumRows < work.rows ? first + kSumRows : work.rows;
      sum_rows(work, weight, first, last, partials + i * work.cols, squares + i * work.cols);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; ++i) {
      alignas(64) float result[kTile];
      const int64_t first = i * kTile;
      const int n = int(work.cols - first < kTile ? work.cols - first : kTile);
      add_chunks(partials + first, work.cols, chunks, n, result);
      store_result(result, n, work.out_dtype, reinterpret_cast<void*>(work.out), first);
      if (work.squares) add_chunks(squares + first, work.cols, chunks, n, work.squares + first);
    }
  }
}

typedef float Lanes __attribute__((vector_size(4 * kAccumulators)));

// Adds the weighted sum of a piece of a row, and its sum of squares.
static void add_piece(const float* __restrict x, const float* __restrict weight, int n, double& sum, double& squares) {
  Lanes weighted = {}, squared = {}, v, w;
  int i = 0;
  for (; i + kAccumulators <= n; i += kAccumulators) {
    std::memcpy(&v, x + i, sizeof v);
    std::memcpy(&w, weight + i, sizeof w);
    weighted += v * w;
    squared += v * v;
  }
  for (int j = 0; j < kAccumulators; ++j) {
    sum += weighted[j];
    squares += squared[j];
  }
  for (; i < n; ++i) {
    sum += x[i] * weight[i];
    squares += x[i] * x[i];
  }
}

static void project_across(const SeededLaunch& work, const float* weight) {
  const int64_t chunks = (work.rows + kSumRows - 1) / kSumRows;
#pragma omp parallel num_threads(work.threads) if (work.threads > 1 && work.rows * work.cols > kSerialElements)
  {
    FlushSubnormals mode;
    alignas(64) float buffer[kTile];
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      float results[kSumRows];
      const int64_t first = chunk * kSumRows, count = work.rows - first < kSumRows ? work.rows - first : kSumRows;
      for (int64_t i = 0; i < count; ++i) {
        double sum = 0, squares = 0;
        for (int64_t col = 0; col < work.cols; col += kTile) {
          const int n = int(work.cols - col < kTile ? work.cols - col : kTile);
          add_piece(load_tile(work.grad, work.grad_dtype, (first + i) * work.cols + col, n, buffer), weight + col, n, sum, squares);
        }
        results[i] = float(sum);
        if (work.squares) work.squares[first + i] = float(squares);
      }
      store_result(results, count, work.out_dtype, reinterpret_cast<void*>(work.out), first);
    }
  }
}

void project_seeded(const void* data) {
  const SeededLaunch& work = *static_cast<const SeededLaunch*>(data);
  const int64_t depth = work.right ? work.cols : work.rows;
  float* rest = work.scratch + seeded_floats(depth, work.rank);
  if (work.rank == 1) {
    draw_projector(work, depth, kF32, work.grad_dtype, work.scratch);
    if (work.right) project_across(work, work.scratch);
    else project_down(work, work.scratch, rest);
    return;
  }
  draw_projector(work, depth, work.grad_dtype, work.grad_dtype, work.scratch);
  const ProjectPlan plan(work.right != 0, work.rows, work.cols, work.rank);
  const ProjectLaunch product = {work.grad, reinterpret_cast<int64_t>(work.scratch), work.out,
                                 rest + round_up(plan.slices * plan.side, 16), work.rows, work.cols, work.rank, work.right,
                                 work.grad_dtype, work.grad_dtype, work.out_dtype, work.low_precision, work.threads, work.isa,
                                 int32_t(sizeof(ProjectLaunch))};
  project_components(product, work.squares, rest);
}

}  // namespace fo
