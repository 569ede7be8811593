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
  // A block of `rows` runs of `bytes`, `stride` apart, spread over `calls` calls.
  Prefetch(int64_t address, int64_t rows, int64_t bytes, int64_t stride, int64_t calls)
      : at_(reinterpret_cast<const char*>(address)), end_(at_ + bytes), rows_(rows), width_(bytes), stride_(stride),
        share_((rows * ((bytes + 63) / 64) + calls - 1) / calls) {}
  void some() {
    for (int64_t left = share_; left > 0 && rows_ > 0;) {
      const char* until = at_ + 64 * left;
      until = until < end_ ? until : end_;
      left -= (until - at_ + 63) / 64;
      for (; at_ < until; at_ += 64) __builtin_prefetch(at_, 0, 2);
      if (at_ < end_) return;
      at_ = end_ - width_ + stride_;
      end_ += stride_;
      --rows_;
    }
  }

 private:
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t rows_ = 0, width_ = 0, stride_ = 0, share_ = 0;
};

// Rows and columns of a kernel call. AVX-512: 12 x 32 is no faster, and 128 is no multiple of 12.
#if defined(__AVX512F__)
constexpr int kRowStep = 8, kColStep = 32;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kRowStep = 6, kColStep = 16;
#else
constexpr int kRowStep = 6, kColStep = 8;
#endif

// Whether products of these types go in pairs of bf16: only where both are bf16 already, or `low` allows fp32 to be rounded.
bool use_pairs(int32_t left, int32_t right, bool low);

// Elements [k, k + depth) x [n, n + columns) of the right operand as panels; missing columns and the odd half of a pair are 0.
void pack_right(const Operand& right, bool pairs, int64_t k, int depth, int64_t n, int columns, float* panels, float* scratch);

// Elements [m, m + rows) x [k, k + depth) of the left operand as panels of kRowStep rows; missing rows are 0. rows is at most
// kLeftRows, or kRowStep where the operand goes along k.
void pack_left(const Operand& left, bool pairs, int64_t m, int rows, int64_t k, int depth, float* panels);

// c[rows, columns] (+)= a left panel times the panels of the right operand. words: of K. rows is at most kRowStep; c has room for
// kRowStep rows of `ldc` floats and for the columns of whole panels.
void multiply(const float* left, bool along_k, bool pairs, int rows, int words, const float* panels, int columns, float* c,
              int64_t ldc, bool add, Prefetch& ahead);

inline int words_of(bool pairs, int depth) { return pairs ? (depth + 1) / 2 : depth; }

}  // namespace fo
