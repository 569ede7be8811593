// Sums of squares of a matrix by row and by column in one read (Adafactor, arXiv 1804.04235), and one total with weights.
// Grid: one CTA per tile of 128 rows x 256 columns; warp w owns rows w, w + 8, ... of it, a lane 8 columns. Partial sums of tiles
// are fp32; a second kernel adds them in order, in double: no atomics, the same bits whatever the order of the CTAs.
#include "access.cuh"
#include "dispatch.h"

namespace fo {

constexpr int kTileRows = 128, kTileCols = 256, kRowBatch = 4;  // rows whose loads a warp issues together
static_assert(kTileCols == 32 * kOctet && kTileRows % (kWarps * kRowBatch) == 0, "a warp spans a tile's columns");

// Addresses that do not apply are null. scratch: fp32 [column tiles, rows], then [row tiles, columns]; a total needs one per tile.
struct Squares {
  int64_t grad, rows, cols, row_tiles, col_tiles;
  const float *mul, *row_weight, *col_weight;
  float *row_out, *col_out, *total_out, *scratch;
  int32_t aligned;  // every row starts at a multiple of 16 bytes
};

FO_DEV Octet load_row(const Squares& s, int64_t row, int64_t col, int live, int shift) {
  const Stream stream = {reinterpret_cast<char*>(s.grad) + ((row * s.cols + col) << (shift - 1)), shift};
  return s.aligned && live >= kOctet ? load_octet(stream, 0) : load_octet_masked(stream, 0, live);
}

template <int Dtype, bool Weighted>
__global__ void __launch_bounds__(kThreads, 3) squares_kernel(const __grid_constant__ Squares s) {
  __shared__ float shared[kWarps][kTileCols];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t tile_row = blockIdx.x / s.col_tiles, tile_col = blockIdx.x % s.col_tiles;
  const int64_t col = tile_col * kTileCols + lane * kOctet, first = tile_row * kTileRows + warp;
  const int64_t beyond = s.cols - col;
  const int live = beyond < kOctet ? beyond < 0 ? 0 : int(beyond) : kOctet;
  const float mul = s.mul ? *s.mul : 1.f;
  float column[kOctet], weight[kOctet], total = 0.f;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    column[i] = 0.f;
    weight[i] = Weighted && i < live ? s.col_weight[col + i] : 0.f;
  }
#pragma unroll 1
  for (int pass = 0; pass < kTileRows / kWarps; pass += kRowBatch) {
    Octet o[kRowBatch];
#pragma unroll
    for (int b = 0; b < kRowBatch; ++b) {
      const int64_t row = first + (pass + b) * kWarps;
      o[b] = Octet{};
      if (row < s.rows) o[b] = load_row(s, row, col, live, dtype_shift(Dtype));
    }
#pragma unroll
    for (int b = 0; b < kRowBatch; ++b) {
      const int64_t row = first + (pass + b) * kWarps;
      float v[kOctet], sum = 0.f;
      widen(v, o[b], Dtype);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const float x = v[i] * mul;
        if (Weighted) {
          sum = fmaf(x * x, weight[i], sum);
        } else {
          sum = fmaf(x, x, sum);
          column[i] = fmaf(x, x, column[i]);
        }
      }
      if (Weighted) {
        if (row < s.rows) total = fmaf(sum, s.row_weight[row], total);
      } else if (s.row_out) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
        if (lane == 0 && row < s.rows) s.scratch[tile_col * s.rows + row] = sum;
      }
    }
  }
  if (!Weighted && !s.col_out) return;
  if (Weighted) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(kAllLanes, total, distance);
    if (lane == 0) shared[warp][0] = total;
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) shared[warp][lane * kOctet + i] = column[i];
  }
  __syncthreads();
  const int64_t mine = tile_col * kTileCols + threadIdx.x;
  if (Weighted ? threadIdx.x > 0 : mine >= s.cols) return;
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared[w][threadIdx.x];
  if (Weighted) s.scratch[blockIdx.x] = sum;
  else s.scratch[s.col_tiles * s.rows + tile_row * s.cols + mine] = sum;
}

// Thread i adds up the tiles of row i or, in the CTAs behind those of the rows, of a column.
__global__ void __launch_bounds__(kThreads) finish_squares(const __grid_constant__ Squares s) {
  const int64_t row_blocks = s.row_out ? (s.rows + kThreads - 1) / kThreads : 0;
  const bool is_row = blockIdx.x < row_blocks;
  const int64_t at = (is_row ? int64_t(blockIdx.x) : blockIdx.x - row_blocks) * kThreads + threadIdx.x;
  const int64_t length = is_row ? s.rows : s.cols, tiles = is_row ? s.col_tiles : s.row_tiles;
  if (at >= length) return;
  const float* from = s.scratch + (is_row ? 0 : s.col_tiles * s.rows) + at;
  double sum = 0;
  for (int64_t i = 0; i < tiles; ++i) sum += double(from[i * length]);
  (is_row ? s.row_out : s.col_out)[at] = float(sum);
}

__global__ void __launch_bounds__(kThreads) finish_total(const __grid_constant__ Squares s) {
  __shared__ double shared[kThreads];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < s.row_tiles * s.col_tiles; i += kThreads) sum += double(s.scratch[i]);
  shared[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *s.total_out = float(shared[0]);
}

template <bool Weighted>
const char* launch_squares(Squares& s, int dtype, void* stream) {
  if (dtype < kF32 || dtype > kF16) return "gradients are fp32, bf16 or fp16";
  if (s.rows <= 0 || s.cols <= 0) return "a matrix without elements has no sums";
  s.row_tiles = (s.rows + kTileRows - 1) / kTileRows;
  s.col_tiles = (s.cols + kTileCols - 1) / kTileCols;
  const int64_t grid = s.row_tiles * s.col_tiles;
  if (grid > 0x7FFFFFFF) return "more tiles than a grid has blocks";
  s.aligned = s.grad % 16 == 0 && s.cols * (dtype == kF32 ? 4 : 2) % 16 == 0;
  if (dtype == kF32) FO_LAUNCH((squares_kernel<kF32, Weighted>), grid, kThreads, stream, s);
  else if (dtype == kBF16) FO_LAUNCH((squares_kernel<kBF16, Weighted>), grid, kThreads, stream, s);
  else FO_LAUNCH((squares_kernel<kF16, Weighted>), grid, kThreads, stream, s);
  const char* error = launch_error();
  if (error) return error;
  if (Weighted) {
    FO_LAUNCH(finish_total, 1, kThreads, stream, s);
  } else {
    const int64_t blocks = (s.row_out ? (s.rows + kThreads - 1) / kThreads : 0) + (s.col_out ? (s.cols + kThreads - 1) / kThreads : 0);
    if (blocks) FO_LAUNCH(finish_squares, blocks, kThreads, stream, s);
  }
  return launch_error();
}

static float* pointer(int64_t address) { return reinterpret_cast<float*>(address); }

}  // namespace fo

int64_t fo_cuda_sums_scratch(int64_t rows, int64_t cols) {
  const int64_t row_tiles = (rows + fo::kTileRows - 1) / fo::kTileRows, col_tiles = (cols + fo::kTileCols - 1) / fo::kTileCols;
  return col_tiles * rows + row_tiles * cols;
}

const char* fo_cuda_row_col_sums(int64_t grad, int dtype, int64_t rows, int64_t cols, int64_t mul, int64_t row_out, int64_t col_out,
                                 int64_t scratch, void* stream) {
  fo::Squares s = {};
  s.grad = grad, s.rows = rows, s.cols = cols, s.mul = fo::pointer(mul), s.scratch = fo::pointer(scratch);
  s.row_out = fo::pointer(row_out), s.col_out = fo::pointer(col_out);
  return fo::launch_squares<false>(s, dtype, stream);
}

const char* fo_cuda_weighted_square_sum(int64_t grad, int dtype, int64_t rows, int64_t cols, int64_t row_weight, int64_t col_weight,
                                        int64_t out, int64_t scratch, void* stream) {
  fo::Squares s = {};
  s.grad = grad, s.rows = rows, s.cols = cols, s.scratch = fo::pointer(scratch);
  s.row_weight = fo::pointer(row_weight), s.col_weight = fo::pointer(col_weight), s.total_out = fo::pointer(out);
  return fo::launch_squares<true>(s, dtype, stream);
}
