// Products of matrices, tile by tile: packed operands, a register tile per kernel call, results added up in a tile in the cache.
//
// K goes in words: fp32 values, or (pairs) two bf16 values for the dot product instruction. The right operand is packed in panels
// [words][columns of a call], the left one in panels of a fixed stride.
#pragma once
#include "matrix.h"

namespace fo {

// A matrix [m, k] or [k, n]: along_k says that consecutive elements differ in k. stride: elements between rows of memory.
struct Operand {
  int64_t address;
  int32_t dtype;
  int64_t stride;
  bool along_k;
};

// Asks for lines of a block of memory before they are needed, a few at each call of `some`.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(int64_t address, int64_t rows, int64_t bytes, int64_t stride, int64_t calls)
      : at_(reinterpret_cast<const char*>(address)), rows_(rows), width_(bytes), stride_(stride) {
    share_ = (rows * ((bytes + 63) / 64) + calls - 1) / (calls > 0 ? calls : 1);
  }
  void some() {
    for (int64_t i = 0; i < share_ && rows_ > 0; ++i) {
      __builtin_prefetch(at_ + offset_, 0, 2);
      offset_ += 64;
      if (offset_ >= width_) offset_ = 0, at_ += stride_, --rows_;
    }
  }

 private:
  const char* at_ = nullptr;
  int64_t rows_ = 0, width_ = 0, stride_ = 0, offset_ = 0, share_ = 0;
};

extern const int kRowStep, kColStep;  // rows and columns of a kernel call

// Whether products of these types go in pairs of bf16: only where both are bf16 already, or `low` allows fp32 to be rounded.
bool use_pairs(int32_t left, int32_t right, bool low);

// Elements [k, k + depth) x [n, n + columns) of the right operand as panels; missing columns and the odd half of a pair are 0.
void pack_right(const Operand& right, bool pairs, int64_t k, int depth, int64_t n, int columns, float* panels, float* scratch);

// c[rows, columns] (+)= left[m.., k..] * panels. rows is at most kRowStep; c has room for kRowStep rows of `ldc` floats and for the
// columns of whole panels. scratch: kLeftFloats.
void multiply(const Operand& left, bool pairs, int64_t m, int rows, int64_t k, int depth, const float* panels, int columns,
              float* c, int64_t ldc, bool add, float* scratch, Prefetch* ahead, int ahead_count);

}  // namespace fo
