// A window of gradients, one row each, as M-FAC's passes take it (history.cpp).
#pragma once
#include <cstdint>

namespace fo {

constexpr int kHistorySpan = 4096;  // columns whose share of the products of a row stands in one entry of `part`

struct History {
  const void* rows;      // fp32, bf16 or codes
  const float* scales;   // null without blocks
  int32_t format;        // with the bit of signed formats
  int64_t window, width;  // rows; columns, of blockwise formats whole blocks
  int64_t row_bytes, row_scales;  // from one row to the next
  int32_t threads;
};

// Of a History. part [spans of the width, window]: the share of each span in the products of row `place` with every row.
void history_products(const void* history, int64_t place, double* part);
// out [width] = sum over rows of y [window] times row.
void history_combine(const void* history, const double* y, float* out);

}  // namespace fo
