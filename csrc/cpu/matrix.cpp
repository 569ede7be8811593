// The update of a projected parameter: u = scale * left @ right (+ a residual), or a scaled gradient, and p - (lr * u + decay * p)
// with every precision. Tiles of u live in the cache, never in memory. GaLore (arXiv 2403.03507) and FRUGAL (arXiv 2411.07837).
#include "matrix.h"

#include "../precision.h"
#include "../stages.h"
#include "gemm.h"
#include "tile.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fo {

static_assert(kApplyCols <= kTile, "a row of a tile is one tile of a parameter");

static int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// One product of a launch and a thread's buffers for it.
struct Product {
  Operand left, right;
  int64_t depth;
  bool pairs;
  int block;     // elements of K per block
  float *panels, *tile;

  bool in_one_block() const { return depth <= block; }
  void pack(int64_t k, int64_t col, int columns, float* scratch) const {
    pack_right(right, pairs, k, int(depth - k < block ? depth - k : block), col, columns, panels, scratch);
  }
};

static void scale_product(float scale, int n, float* __restrict u) {
  for (int i = 0; i < n; ++i) u[i] = scale * u[i];
}

static void add_sign(const float* __restrict g, const float* __restrict back, float by, int n, float* __restrict u) {
  for (int i = 0; i < n; ++i) u[i] = u[i] + by * sign(g[i] - back[i]);
}

static void add_rest(const float* __restrict g, const float* __restrict back, float by, int n, float* __restrict u) {
  for (int i = 0; i < n; ++i) u[i] = u[i] + by * (g[i] - back[i]);
}

static void scale_gradient(const float* __restrict g, float by, int n, float* __restrict u) {
  for (int i = 0; i < n; ++i) u[i] = by * g[i];
}

static void scale_gradient(const float* __restrict g, const float* __restrict col, float by, int n, float* __restrict u) {
  for (int i = 0; i < n; ++i) u[i] = by * col[i] * g[i];
}

static void update(const float* __restrict u, const Stage s, int n, float* __restrict p) {
  for (int i = 0; i < n; ++i) p[i] = epilogue(p[i], u[i], s);
}

static void update(const float* __restrict product, float scale, const Stage s, int n, float* __restrict p) {
  for (int i = 0; i < n; ++i) p[i] = epilogue(p[i], scale * product[i], s);
}

static FO_HD float load(float x) { return x; }
static FO_HD float load(uint16_t x) { return bf16_to_float(x); }
static FO_HD void store(float* to, float x) { *to = x; }
static FO_HD void store(uint16_t* to, float x) { *to = float_to_bf16(x); }

// The result of one kernel call into parameters that are stepped where they lie.
template <class P>
static void update_block(const float* __restrict product, float scale, const Stage s, int rows, int columns, P* __restrict p,
                         int64_t stride) {
  for (int i = 0; i < rows; ++i, product += kColStep, p += stride) {
    if (columns == kColStep) {
      for (int j = 0; j < kColStep; ++j) store(p + j, epilogue(load(p[j]), scale * product[j], s));
    } else {
      for (int j = 0; j < columns; ++j) store(p + j, epilogue(load(p[j]), scale * product[j], s));
    }
  }
}

// What all tasks of a launch share.
struct Update {
  const MatrixLaunch& work;
  Launch launch = {};
  int64_t table[kColumns] = {};
  Head head;
  Stage stage;
  float residual;
  int products, param_bytes, grad_bytes;
  bool in_one_block, in_place;

  explicit Update(const MatrixLaunch& w) : work(w) {
    launch.param_dtype = w.param_dtype;
    launch.precision = w.precision;
    launch.grad_scale = w.grad_scale;
    launch.clip = w.clip;
    table[kParam] = w.param;
    table[kCompanion] = w.companion;
    table[kMeta] = w.tensor_id << 32;
    launch.table = table;
    launch.rows = 1;
    std::memcpy(&head, w.scalars, sizeof head);
    stage = {unscale(launch) * head.grad_sign, 0.f, 1.f, head.lr, head.decay};
    residual = w.residual == kResidualSign ? w.residual_scale * head.grad_sign : w.residual_scale * stage.grad_mul;
    products = (w.left != 0) + (w.residual != kNoResidual);
    param_bytes = w.param_dtype == kF32 || w.precision == kMaster ? 4 : 2;
    grad_bytes = w.grad_dtype == kF32 ? 4 : 2;
    Product parts[2];
    make(parts, nullptr);
    in_one_block = true;
    for (int i = 0; i < products; ++i) in_one_block &= parts[i].in_one_block();
    in_place = w.left != 0 && products == 1 && in_one_block && w.param_dtype == kF32;
#if defined(__AVX512F__)  // as in driver.h
    in_place |= w.left != 0 && products == 1 && in_one_block && w.param_dtype == kBF16 && w.precision == kNearest;
#endif
  }

  void make(Product (&parts)[2], float* buffer) const {
    const bool low = work.low_precision != 0;
    parts[0] = {{work.left, work.left_dtype, work.rank, true}, {work.right, work.right_dtype, work.cols, false},
                work.rank, false, 0, nullptr, nullptr};
    parts[1] = {{work.grad_left, work.grad_left_dtype, work.grad_rank, true}, {work.grad_right, work.grad_right_dtype, work.cols, false},
                work.grad_rank, false, 0, nullptr, nullptr};
    for (Product& part : parts) {
      part.pairs = use_pairs(part.left.dtype, part.right.dtype, low);
      part.block = part.pairs ? 2 * kWords : kWords;
      if (!buffer) continue;
      part.panels = buffer;
      part.tile = buffer + right_floats(kApplyCols);
      buffer += right_floats(kApplyCols) + int64_t(kApplyRows) * kApplyCols;
    }
  }

  // One row of a tile.
  void row(const Row& entry, int64_t r, int64_t col, int n, float* u, const float* back) const {
    alignas(64) float params[kTile], grads[kTile];
    const int64_t offset = r * work.cols + col;
    if (work.left && work.residual != kNoResidual) {
      scale_product(work.scale, n, u);
    } else if (!work.left) {
      const float* g = load_tile(work.grad, work.grad_dtype, offset, n, grads);
      const float by = work.row_factor ? work.scale * reinterpret_cast<const float*>(work.row_factor)[r] : work.scale;
      if (work.col_factor) scale_gradient(g, reinterpret_cast<const float*>(work.col_factor) + col, by, n, u);
      else scale_gradient(g, by, n, u);
    }
    if (work.residual != kNoResidual) {
      const float* g = load_tile(work.grad, work.grad_dtype, offset, n, grads);
      if (work.residual == kResidualSign) add_sign(g, back, residual, n, u);
      else add_rest(g, back, residual, n, u);
    }
    float* p = load_param(launch, entry, offset, n, params);
    if (work.left && work.residual == kNoResidual) update(u, work.scale, stage, n, p);
    else update(u, stage, n, p);
    store_param(launch, entry, head, offset, n, p);
  }

  // The same as `span`, for parameters that are stepped where they lie: right after each kernel call, so that this work and the
  // products of the next call overlap. bf16 takes a tenth less time than by rows of a tile, fp32 a hundredth.
  template <class P>
  void span_in_place(int64_t first, int64_t last, int64_t col, int columns, float* scratch) const {
    Product parts[2];
    make(parts, scratch + kLeftFloats);
    const Product& part = parts[0];
    const int depth = int(part.depth), words = words_of(part.pairs, depth);
    part.pack(0, col, columns, scratch);
    for (int64_t r = first; r < last; r += kRowStep) {
      const int some = int(last - r < kRowStep ? last - r : kRowStep);
      P* weights = reinterpret_cast<P*>(work.param) + r * work.cols + col;
      const int64_t left = last - r - some, rows = left < kRowStep ? left : kRowStep;
      Prefetch ahead(reinterpret_cast<int64_t>(weights + some * work.cols), rows, int64_t(columns) * sizeof(P), work.cols * sizeof(P),
                     (columns + kColStep - 1) / kColStep);
      pack_left(part.left, part.pairs, r, some, 0, depth, scratch);
      const float* panel = part.panels;
      for (int j = 0; j < columns; j += kColStep, panel += (words + 1) * kColStep) {
        const int wide = columns - j < kColStep ? columns - j : kColStep;
        multiply(scratch, true, part.pairs, some, words, panel, wide, part.tile, kColStep, false, ahead);
        update_block(part.tile, work.scale, stage, some, wide, weights + j, work.cols);
      }
    }
  }

  // Rows [first, last) of the columns from `col`.
  void span(int64_t first, int64_t last, int64_t col, int columns, float* scratch) const {
    if (in_place && work.param_dtype == kF32) return span_in_place<float>(first, last, col, columns, scratch);
    if (in_place) return span_in_place<uint16_t>(first, last, col, columns, scratch);
    const Row entry(launch, 0);
    Product parts[2];
    make(parts, scratch + kLeftFloats);
    const int64_t step = in_one_block ? kRowStep : kApplyRows;
    const int64_t width = round_up(columns, kColStep), calls = width / kColStep;
    for (int64_t r = first; r < last; r += step) {
      const int rows = int(last - r < step ? last - r : step);
      for (int i = 0; i < products; ++i) {
        const Product& part = parts[i];
        for (int64_t k = 0; k < part.depth; k += part.block) {
          if (r == first || !in_one_block) part.pack(k, col, columns, scratch);
          const int depth = int(part.depth - k < part.block ? part.depth - k : part.block);
          for (int done = 0; done < rows; done += kRowStep) {
            const int some = rows - done < kRowStep ? rows - done : kRowStep;
            const int64_t offset = (r + done) * work.cols + col;
            Prefetch ahead;  // of the weights during the first product, of the gradient during the second
            if (k == 0 && i == 0) {
              const int64_t weights = work.precision == kMaster && work.companion ? work.companion : work.param;
              ahead = Prefetch(weights + offset * param_bytes, some, int64_t(columns) * param_bytes, work.cols * param_bytes, calls);
            } else if (k == 0) {
              ahead = Prefetch(work.grad + offset * grad_bytes, some, int64_t(columns) * grad_bytes, work.cols * grad_bytes, calls);
            }
            pack_left(part.left, part.pairs, r + done, some, k, depth, scratch);
            multiply(scratch, true, part.pairs, some, words_of(part.pairs, depth), part.panels, columns, part.tile + done * width,
                     width, k > 0, ahead);
          }
        }
      }
      for (int i = 0; i < rows; ++i) row(entry, r + i, col, columns, parts[0].tile + i * width, parts[1].tile + i * width);
    }
  }
};

// A scaled gradient: whole rows, so that memory is read and written in order. In tiles of products it takes twice as long.
static void apply_scaled(const Update& all) {
  const MatrixLaunch& work = all.work;
  const int64_t rows = work.cols < kScaledElements ? kScaledElements / work.cols : 1, tasks = (work.rows + rows - 1) / rows;
#pragma omp parallel num_threads(work.threads) if (work.threads > 1 && work.rows * work.cols > kSerialElements)
  {
    FlushSubnormals mode;
    const Row entry(all.launch, 0);
    alignas(64) float u[kTile];
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) {
      for (int64_t r = i * rows; r < (i + 1) * rows && r < work.rows; ++r) {
        for (int64_t col = 0; col < work.cols; col += kTile) {
          all.row(entry, r, col, int(work.cols - col < kTile ? work.cols - col : kTile), u, nullptr);
        }
      }
    }
  }
}

void apply_matrix(const void* data) {
  const MatrixLaunch& work = *static_cast<const MatrixLaunch*>(data);
  if (work.found_inf && *work.found_inf != 0.f) return;
  const Update all(work);
  if (!work.left) return apply_scaled(all);
  const int64_t across = (work.cols + kApplyCols - 1) / kApplyCols, down = (work.rows + kApplySpan - 1) / kApplySpan;
  const int64_t floats = apply_thread_floats(work.residual != kNoResidual);
#pragma omp parallel num_threads(work.threads) if (work.threads > 1 && work.rows * work.cols > kSerialElements)
  {
    FlushSubnormals mode;
    float* scratch = work.scratch + thread_number() * floats;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < across * down; ++i) {
      const int64_t first = i / across * kApplySpan, last = first + kApplySpan, col = i % across * kApplyCols;
      const int64_t columns = work.cols - col < kApplyCols ? work.cols - col : kApplyCols;
      all.span(first, last < work.rows ? last : work.rows, col, int(columns), scratch);
    }
  }
}

}  // namespace fo
