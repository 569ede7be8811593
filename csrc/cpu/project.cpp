// The projection of a gradient: projector^T G or G projector^T, G read once (GaLore, arXiv 2403.03507), with the sums of squares
// of the columns or rows that stay (APOLLO, arXiv 2412.05270).
//
// K is cut into slices by the shape alone (ProjectPlan); a slice adds up blocks of kWords words in order.
#include "project.h"

#include "gemm.h"

#include "../precision.h"
#include "parallel.h"
#include "reduce.h"
#include "tile.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fo {

void store_result(const float* __restrict x, int64_t n, int32_t dtype, void* to, int64_t offset) {
  if (dtype == kF32) {
    std::memcpy(static_cast<float*>(to) + offset, x, size_t(n) * 4);
    return;
  }
  uint16_t* __restrict out = static_cast<uint16_t*>(to) + offset;
  if (dtype == kBF16) for (int64_t i = 0; i < n; ++i) out[i] = float_to_bf16(x[i]);
  else for (int64_t i = 0; i < n; ++i) out[i] = float_to_f16(x[i]);
}

static void add_squares(const float* __restrict x, int n, float* __restrict sum) {
  for (int i = 0; i < n; ++i) sum[i] += x[i] * x[i];
}

// Adds the squares of a block's rows to a sum per column; at most kSumRows of them add up in fp32.
static void add_square_rows(const ProjectLaunch& work, int64_t row, int rows, int64_t col, int columns, double* sums) {
  alignas(64) float buffer[kProjectCols], part[kProjectCols];
  for (int64_t first = row; first < row + rows; first += kSumRows) {
    const int64_t last = first + kSumRows < row + rows ? first + kSumRows : row + rows;
    std::memset(part, 0, sizeof part);
    for (int64_t r = first; r < last; ++r) {
      add_squares(load_tile(work.grad, work.grad_dtype, r * work.cols + col, columns, buffer), columns, part);
    }
    for (int i = 0; i < columns; ++i) sums[i] += part[i];
  }
}

static double square_sum(const ProjectLaunch& work, int64_t row, int64_t col, int n) {
  alignas(64) float buffer[2 * kWords];
  SquareSum piece;
  piece.add(load_tile(work.grad, work.grad_dtype, row * work.cols + col, n, buffer), n);
  return piece.total();
}

struct Projection {
  const ProjectLaunch& work;
  ProjectPlan plan;
  Operand left, right;  // of the product, whose result is [m, n]
  int64_t m, n;
  int block, grad_bytes;
  bool pairs;

  Projection(const ProjectLaunch& w, bool by_component) : work(w), plan(w.right != 0, w.rows, w.cols, w.rank) {
    if (w.right) {
      left = {w.grad, w.grad_dtype, w.cols, true};
      right = {w.projector, w.projector_dtype, w.cols, true};
      m = w.rows, n = w.rank;
    } else {
      left = {w.projector, w.projector_dtype, by_component ? w.rows : w.rank, by_component};
      right = {w.grad, w.grad_dtype, w.cols, false};
      m = w.rank, n = w.cols;
    }
    pairs = use_pairs(left.dtype, right.dtype, w.low_precision != 0);
    // With fp32 operands that become pairs, a block of 2 * kWords and the one asked for ahead overflow the second-level cache.
    block = pairs && left.dtype == kBF16 && right.dtype == kBF16 ? 2 * kWords : kWords;
    grad_bytes = w.grad_dtype == kF32 ? 4 : 2;
  }

  int64_t result_floats() const { return m * n; }

  // Rows of the result [row, row + rows) x columns [col, col + columns), K from `from` to `to`, added up in `tile`. squares: of
  // the columns (left) or rows (right) of the result in this slice, or null.
  void task(int64_t row, int64_t rows, int64_t col, int64_t columns, int64_t from, int64_t to, float* partial, float* squares,
            float* scratch) const {
    double sums[kLargestBlock] = {};
    float *panels = scratch + kLeftFloats, *tile = panels + right_floats(kProjectCols);
    const int64_t ldc = round_up(columns, 32);
    for (int64_t k = from; k < to; k += block) {
      const int depth = int(to - k < block ? to - k : block), words = words_of(pairs, depth);
      const int64_t next = k + depth, deep = to - next < block ? to - next : block;
      for (int64_t part = 0; part < columns; part += kProjectCols) {
        const int wide = int(columns - part < kProjectCols ? columns - part : kProjectCols);
        pack_right(right, pairs, k, depth, col + part, wide, panels, scratch);
        if (squares && !work.right) add_square_rows(work, k, depth, col + part, wide, sums);
        const int64_t calls = (wide + kColStep - 1) / kColStep;
        Prefetch block_ahead;
        if (!work.right && deep > 0) {
          block_ahead = Prefetch(work.grad + (next * work.cols + col + part) * grad_bytes, deep, int64_t(wide) * grad_bytes,
                                 work.cols * grad_bytes, calls * ((rows + kRowStep - 1) / kRowStep));
        }
        for (int64_t r = 0; r < rows; r += kRowStep) {
          const int some = int(rows - r < kRowStep ? rows - r : kRowStep);
          if (work.right && part == 0) {  // the rows that come next, or the first ones of the next block
            const bool same = r + some < rows;
            const int64_t ahead = same ? row + r + some : row, at_k = same ? k : next, length = same ? depth : deep;
            const int64_t count = rows - r - some < kRowStep && same ? rows - r - some : kRowStep < rows ? kRowStep : rows;
            block_ahead = Prefetch(work.grad + (ahead * work.cols + at_k) * grad_bytes, length > 0 ? count : 0, length * grad_bytes,
                                   work.cols * grad_bytes, calls);
          }
          const int group = int(rows - r < kLeftRows ? rows - r : kLeftRows);
          if (squares && work.right && part == 0) {
            for (int i = 0; i < some; ++i) sums[r + i] += square_sum(work, row + r + i, k, depth);
          }
          if (left.along_k) pack_left(left, pairs, row + r, some, k, depth, scratch);
          else if (r % kLeftRows == 0) pack_left(left, pairs, row + r, group, k, depth, scratch);
          const float* packed = left.along_k ? scratch : scratch + r % kLeftRows * words;
          multiply(packed, left.along_k, pairs, some, words, panels, wide, tile + r * ldc + part, ldc, k > from, block_ahead);
        }
      }
    }
    if (squares) {
      const int64_t first = work.right ? row : col, count = work.right ? rows : columns;
      for (int64_t i = 0; i < count; ++i) squares[first + i] = float(sums[i]);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t offset = (row + r) * n + col;
      if (partial) std::memcpy(partial + offset, tile + r * ldc, size_t(columns) * 4);
      else store_result(tile + r * ldc, columns, work.out_dtype, reinterpret_cast<void*>(work.out), offset);
    }
  }
};

static void add_slice(const float* __restrict x, int64_t n, float* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
}

static void add_square_slices(const float* partial, int64_t slices, int64_t n, float* squares) {
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t slice = 0; slice < slices; ++slice) sum += partial[slice * n + i];
    squares[i] = float(sum);
  }
}

static void run(const ProjectLaunch& work, bool by_component, float* squares, float* square_slices) {
  const Projection all(work, by_component);
  const ProjectPlan& plan = all.plan;
  const int64_t floats = project_thread_floats(plan), numel = all.result_floats();
  float* partials = plan.slices > 1 ? work.scratch + work.threads * floats : nullptr;
#pragma omp parallel num_threads(work.threads) if (work.threads > 1 && work.rows * work.cols > kSerialElements)
  {
    FlushSubnormals mode;
#if defined(_OPENMP)
    float* scratch = work.scratch + omp_get_thread_num() * floats;
#else
    float* scratch = work.scratch;
#endif
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < plan.blocks * plan.slices; ++i) {
      const int64_t first = i % plan.blocks * plan.block, slice = i / plan.blocks, from = slice * plan.slice;
      const int64_t count = plan.side - first < plan.block ? plan.side - first : plan.block;
      const int64_t to = from + plan.slice < plan.depth ? from + plan.slice : plan.depth;
      float* partial = partials ? partials + slice * numel : nullptr;
      float* sums = squares && partials ? square_slices + slice * plan.side : squares;
      if (work.right) all.task(first, count, 0, work.rank, from, to, partial, sums, scratch);
      else all.task(0, work.rank, first, count, from, to, partial, sums, scratch);
    }
    if (partials) {
      constexpr int64_t kStep = 4096;
#pragma omp for schedule(static)
      for (int64_t first = 0; first < numel; first += kStep) {
        const int64_t count = numel - first < kStep ? numel - first : kStep;
        for (int64_t slice = 1; slice < plan.slices; ++slice) add_slice(partials + slice * numel + first, count, partials + first);
        store_result(partials + first, count, work.out_dtype, reinterpret_cast<void*>(work.out), first);
      }
    }
  }
  if (squares && partials) add_square_slices(square_slices, plan.slices, plan.side, squares);
}

void project(const void* data) { run(*static_cast<const ProjectLaunch*>(data), false, nullptr, nullptr); }

void project_components(const ProjectLaunch& work, float* squares, float* square_slices) { run(work, true, squares, square_slices); }

}  // namespace fo
