// Matrix work on the CPU: the update of a projected parameter, the projection of a gradient, and sums of squares by row and column.
//
// Matrices are row-major without gaps. Results have the same bits for every thread count: the parts that a sum is made of depend
// on the shape alone.
#pragma once
#include "../fusedopt.h"

namespace fo {

enum Residual : int32_t { kNoResidual = 0, kResidualSign = 1, kResidualGradient = 2 };

// p <- p - (lr * u + decay * p), MatrixWork of fusedopt/backends/base.py. Python packs this struct and the next ones field by field.
struct MatrixLaunch {
  int64_t param, companion, left, right, grad, row_factor, col_factor, grad_left, grad_right;  // addresses; 0: does not apply
  const float *scalars, *grad_scale, *found_inf;
  float* clip;  // read only, of the type that Launch has
  float* scratch;  // apply_scratch() floats
  int64_t rows, cols, rank, grad_rank, tensor_id;
  float scale, residual_scale;
  int32_t param_dtype, precision, grad_dtype, left_dtype, right_dtype, grad_left_dtype, grad_right_dtype;
  int32_t residual, low_precision, threads, isa, bytes;
};

// out = projector^T grad (left: [rank, cols], projector [rows, rank]) or grad projector^T (right: [rows, rank], projector [rank, cols]).
struct ProjectLaunch {
  int64_t grad, projector, out;
  float* scratch;  // project_scratch() floats
  int64_t rows, cols, rank;
  int32_t right, grad_dtype, projector_dtype, out_dtype, low_precision, threads, isa, bytes;
};

// The projection with APOLLO's random projector (normal.h), and the sums of squares of the columns (left) or rows (right) of the
// gradient, or null.
struct SeededLaunch {
  int64_t grad, out;
  float *squares, *scratch;  // seeded_scratch() floats
  uint64_t seed;
  int64_t rows, cols, rank, tensor_id;
  uint32_t step;
  int32_t right, grad_dtype, out_dtype, low_precision, threads, isa, bytes;
};

// Sums of (mul * g)^2 by row and by column (either may be null), or, with weights, the sum of g_ij^2 row_weight_i col_weight_j.
struct SumsLaunch {
  int64_t grad;
  float *row_out, *col_out, *total_out;
  const float *mul, *row_weight, *col_weight;
  float* scratch;  // sums_scratch() floats
  int64_t rows, cols;
  int32_t grad_dtype, threads, isa, bytes;
};

// Work and buffers of the products, the same for every instruction set. A block of K words (fp32 values, or pairs of bf16) of the
// right operand and a tile of the result stay in the second-level cache.
constexpr int kWords = 256;        // words of K per block
constexpr int kLargestPanel = 16;  // room for the rows that one kernel call takes
constexpr int kPad = 64;           // floats: keeps the buffers of a thread in lines of their own
constexpr int kLeftRows = 48;      // of a left operand that are packed at once: a multiple of all row steps
constexpr int kLeftFloats = (kLeftRows + kLargestPanel) * (kWords + 16) + kPad;
FO_HD int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
FO_HD int64_t right_floats(int64_t columns) { return (kWords + 1) * round_up(columns, 32) + kPad; }

constexpr int kApplyCols = 512;   // of a tile: the epilogue sees rows of this length
constexpr int kApplyRows = 96;    // of a tile where K takes more than one block; a multiple of all row steps
constexpr int kApplySpan = 384;   // rows of a task
constexpr int64_t kScaledElements = 1 << 15;  // of a task that scales a gradient, at least a row
FO_HD int64_t apply_thread_floats(bool residual) {
  return kLeftFloats + (residual ? 2 : 1) * (right_floats(kApplyCols) + int64_t(kApplyRows) * kApplyCols);
}
FO_HD int64_t apply_scratch(bool residual, int threads) { return threads * apply_thread_floats(residual); }

// A projection: tasks are blocks of the long side of the result times slices of K. Where slices are more than one, their sums are
// added in order.
struct ProjectPlan {
  int64_t side, depth, block, blocks, slice, slices, tile;  // tile: floats of a task's result

  ProjectPlan(bool right, int64_t rows, int64_t cols, int64_t rank) {
    side = right ? rows : cols, depth = right ? cols : rows;
    int64_t room = 65536 / (rank ? rank : 1);
    if (right) {
      block = round_up((side + 15) / 16, 8);
      if (block > room) block = room / 8 * 8;
      block = block > 480 ? 480 : block < 48 ? 48 : block;
      tile = (block + kLargestPanel) * round_up(rank, 32);
    } else {
      block = room / 32 * 32;
      block = block > 256 ? 256 : block < 64 ? 64 : block;
      tile = (rank + kLargestPanel) * block;
    }
    blocks = (side + block - 1) / block;
    const int64_t most = (depth + 4 * kWords - 1) / (4 * kWords);
    slices = blocks ? (16 + blocks - 1) / blocks : 1;
    slices = slices > most ? most : slices;
    slices = slices < 1 ? 1 : slices;
    slice = round_up((depth + slices - 1) / slices, 2 * kWords);
    slices = slice ? (depth + slice - 1) / slice : 1;
  }
};
constexpr int kLargestBlock = 480;  // of a ProjectPlan
constexpr int kProjectCols = 256;  // of the result a right projection works on at once
FO_HD int64_t project_thread_floats(const ProjectPlan& plan) { return kLeftFloats + right_floats(kProjectCols) + plan.tile + kPad; }
inline int64_t project_scratch(bool right, int64_t rows, int64_t cols, int64_t rank, int threads) {
  const ProjectPlan plan(right, rows, cols, rank);
  return threads * project_thread_floats(plan) + (plan.slices > 1 ? plan.slices * plan.side * rank : 0);
}

constexpr int64_t kSumRows = 64;  // rows that share one partial sum per column
FO_HD int64_t sums_scratch(int64_t rows, int64_t cols, bool columns) {
  const int64_t chunks = (rows + kSumRows - 1) / kSumRows;
  return columns ? chunks * cols : 2 * chunks + 2;
}

// Of a seeded projection: room for the projector and for the sums of squares of slices, before that of the product. Rank 1: for
// the projector, and on the left for two sums per column of the rows of a chunk.
FO_HD int64_t seeded_floats(int64_t depth, int64_t rank) { return round_up(rank * depth, 16); }
inline int64_t seeded_scratch(bool right, int64_t rows, int64_t cols, int64_t rank, int threads) {
  const int64_t own = seeded_floats(right ? cols : rows, rank);
  if (rank == 1) return own + (right ? 0 : 2 * sums_scratch(rows, cols, true));
  const ProjectPlan plan(right, rows, cols, rank);
  return own + round_up(plan.slices * plan.side, 16) + project_scratch(right, rows, cols, rank, threads);
}

}  // namespace fo
