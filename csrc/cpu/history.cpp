// M-FAC's two passes over a window of gradients in its format (arXiv 2107.03356): the products of a row with all rows, and a
// combination of the rows. Values are decoded in the first-level cache, multiplied and added in double precision; every sum has
// one order, whatever the threads and the instruction set.
#include "history.h"

#include "codec.h"
#include "parallel.h"
#include "tile.h"

namespace fo {

constexpr int kSpan = 4096;  // columns at a time: 16 KB of a decoded row, and 32 KB of it or of sums in double precision
static_assert(kSpan % kBlock == 0 && kSpan == kHistorySpan, "spans divide rows into whole blocks");

// n values from column `first` of a row on; in place where the row is fp32.
static const float* load(const History& h, int64_t row, int64_t first, int n, float* buffer) {
  const uint8_t* codes = static_cast<const uint8_t*>(h.rows) + row * h.row_bytes;
  if (!is_blockwise(h.format)) return load_tile(int64_t(codes), (h.format & kFormatMask) == kFormatBF16 ? kBF16 : kF32, first, n, buffer);
  const float* scales = h.scales + row * h.row_scales;
  decode_blocks(h.format, codes + first * code_bits(h.format) / 8, scales + first / block_size(h.format), n, buffer);
  return buffer;
}

// Plain sums side by side: gcc 12 makes better code of them than of vectors that it has to widen (0.06 ns an element against
// 0.12 to 0.18 with AVX-512, 0.09 against 0.17 and more with AVX2).
static double dot(const float* x, const double* g, int n) {
  constexpr int kSums = 32;
  double sums[kSums] = {};
  int i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int k = 0; k < kSums; ++k) sums[k] += double(x[i + k]) * g[i + k];
  }
  for (int k = 0; i + k < n; ++k) sums[k] += double(x[i + k]) * g[i + k];
  for (int half = kSums / 2; half; half /= 2) {
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

// body(span, first column, columns) for every span of the rows.
template <class Body>
static void for_spans(const History& h, const Body& body) {
  const int64_t spans = (h.width + kSpan - 1) / kSpan;
  const auto one = [&](int64_t span) {
    const int64_t left = h.width - span * kSpan;
    body(span, span * kSpan, int(left < kSpan ? left : kSpan));
  };
  if (h.threads > 1 && spans > 1 && h.width * h.window > kSerialElements) {
#pragma omp parallel num_threads(h.threads)
    {
      FlushSubnormals mode;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < spans; ++i) one(i);
    }
  } else {
    FlushSubnormals mode;
    for (int64_t i = 0; i < spans; ++i) one(i);
  }
}

void history_products(const void* history, int64_t place, double* part) {
  const History& h = *static_cast<const History*>(history);
  for_spans(h, [&](int64_t span, int64_t first, int n) {
    alignas(64) float buffer[kSpan];
    alignas(64) double g[kSpan];
    const float* mine = load(h, place, first, n, buffer);
    for (int i = 0; i < n; ++i) g[i] = mine[i];
    for (int64_t row = 0; row < h.window; ++row) part[span * h.window + row] = dot(load(h, row, first, n, buffer), g, n);
  });
}

void history_combine(const void* history, const double* y, float* out) {
  const History& h = *static_cast<const History*>(history);
  for_spans(h, [&](int64_t, int64_t first, int n) {
    alignas(64) float buffer[kSpan];
    alignas(64) double sums[kSpan] = {};
    for (int64_t row = 0; row < h.window; ++row) {
      const float* x = load(h, row, first, n, buffer);
      const double factor = y[row];
      for (int i = 0; i < n; ++i) sums[i] += factor * double(x[i]);
    }
    for (int i = 0; i < n; ++i) out[first + i] = float(sums[i]);
  });
}

}  // namespace fo
