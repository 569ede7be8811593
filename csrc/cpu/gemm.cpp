// Kernels and packing of gemm.h. fp32 multiplies and adds are fused where the instruction set can; pairs of bf16 need
// AVX512_BF16, which is looked for at run time. The sums of a call stay in registers.
#include "gemm.h"

#include "../precision.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__has_include)
#if __has_include(<avx512bf16intrin.h>)
#define FO_PAIRS 1
#define FO_PAIRS_TARGET __attribute__((target("avx512bf16")))
#endif
#endif

namespace fo {

#if defined(__AVX512F__)
typedef __m512 Vector;
static FO_HD Vector fused(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
static FO_HD Vector broadcast(float x) { return _mm512_set1_ps(x); }
#elif defined(__AVX2__) && defined(__FMA__)
typedef __m256 Vector;
static FO_HD Vector fused(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
static FO_HD Vector broadcast(float x) { return _mm256_set1_ps(x); }
#else
typedef float Vector __attribute__((vector_size(16)));
static FO_HD Vector fused(Vector a, Vector b, Vector c) { return c + a * b; }
static FO_HD Vector broadcast(float x) { return Vector{} + x; }
#endif

constexpr int kVectors = 2, kLanes = sizeof(Vector) / 4, kRows = kRowStep, kCols = kColStep;
constexpr int kStride = kWords + 16;  // of a left panel along k: rows of one panel start in different cache sets
static_assert(kCols == kVectors * kLanes && kRows <= kLargestPanel && 32 % kCols == 0, "buffers fit all kernels");
static_assert(kApplyRows % kRows == 0 && kLeftRows % kRows == 0, "groups of rows are whole panels");

static FO_HD Vector load_vector(const float* x) {
  Vector v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

// The sums of one call, to c; Rows times kVectors registers.
template <int Rows>
static FO_HD void store_sums(const Vector (&sum)[Rows][kVectors], float* c, int64_t ldc, bool add) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * ldc + j * kLanes;
      const Vector v = add ? load_vector(to) + sum[i][j] : sum[i][j];
      std::memcpy(to, &v, sizeof v);
    }
  }
}

// Element (i, k) of the left panel is a[i * I + k * K].
template <int Rows, int I, int K>
static void kernel(const float* a, const float* b, float* c, int words, int64_t ldc, bool add) {
  Vector sum[Rows][kVectors] = {};
  for (int k = 0; k < words; ++k) {
    const Vector b0 = load_vector(b + k * kCols), b1 = load_vector(b + k * kCols + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vector x = broadcast(a[i * I + k * K]);
      sum[i][0] = fused(x, b0, sum[i][0]);
      sum[i][1] = fused(x, b1, sum[i][1]);
    }
  }
  store_sums<Rows>(sum, c, ldc, add);
}

#if FO_PAIRS
template <int Rows, int I, int K>
FO_PAIRS_TARGET static void pair_kernel(const float* a, const float* b, float* c, int words, int64_t ldc, bool add) {
  Vector sum[Rows][kVectors] = {};
  for (int k = 0; k < words; ++k) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * kCols), b1 = (__m512bh)_mm512_loadu_si512(b + k * kCols + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const __m512bh x = (__m512bh)_mm512_set1_ps(a[i * I + k * K]);
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, b0);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, b1);
    }
  }
  store_sums<Rows>(sum, c, ldc, add);
}
#endif

using Kernel = void (*)(const float*, const float*, float*, int, int64_t, bool);

// A panel with at most half of its rows takes a kernel of half the rows.
template <int I, int K>
static Kernel choose(bool pairs, int rows) {
#if FO_PAIRS
  if (pairs) return 2 * rows > kRows ? pair_kernel<kRows, I, K> : pair_kernel<kRows / 2, I, K>;
#else
  (void)pairs;
#endif
  return 2 * rows > kRows ? kernel<kRows, I, K> : kernel<kRows / 2, I, K>;
}

bool use_pairs(int32_t left, int32_t right, bool low) {
#if FO_PAIRS
  static const bool present = __builtin_cpu_supports("avx512bf16");
  const auto fits = [low](int32_t dtype) { return dtype == kBF16 || (dtype == kF32 && low); };
  return present && fits(left) && fits(right);
#else
  (void)left, (void)right, (void)low;
  return false;
#endif
}

struct Half { uint16_t bits; };
struct Brain { uint16_t bits; };
static FO_HD float value(float x) { return x; }
static FO_HD float value(Half x) { return f16_to_float(x.bits); }
static FO_HD float value(Brain x) { return bf16_to_float(x.bits); }

template <class T>
static FO_HD const T* at(const Operand& m, int64_t row, int64_t column) {
  return reinterpret_cast<const T*>(m.address) + row * m.stride + column;
}

// Calls body(T{}) with the type of an operand's elements.
template <class Body>
static void by_type(int32_t dtype, const Body& body) {
  if (dtype == kF32) body(float{});
  else if (dtype == kBF16) body(Brain{});
  else body(Half{});
}

template <class T>
static void widen(const T* __restrict x, int n, float* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = value(x[i]);
}

#if FO_PAIRS
// n values along k as pairs; an odd one is paired with 0.
FO_PAIRS_TARGET static void pair_along(const float* x, int n, float* words) {
  uint16_t* out = reinterpret_cast<uint16_t*>(words);
  int i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512bh two = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i));
    _mm512_storeu_si512(out + i, (__m512i)two);
  }
  for (; i < n; ++i) out[i] = float_to_bf16(x[i]);
  if (n & 1) out[n] = 0;
}

static void pair_along(const Brain* x, int n, float* words) {
  std::memcpy(words, x, size_t(n) * 2);
  if (n & 1) reinterpret_cast<uint16_t*>(words)[n] = 0;
}

// Up to 16 pairs of neighbours in k that lie in two rows.
FO_PAIRS_TARGET static FO_HD void pair_across(const float* even, const float* odd, __mmask16 live, float* words) {
  const __m512i by = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                      18, 2, 17, 1, 16, 0);
  const __m512 low = _mm512_maskz_loadu_ps(live, even), high = odd ? _mm512_maskz_loadu_ps(live, odd) : _mm512_setzero_ps();
  const __m512i two = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  _mm512_mask_storeu_ps(words, live, _mm512_castsi512_ps(_mm512_permutexvar_epi16(by, two)));
}

static FO_HD void pair_across(const Brain* even, const Brain* odd, __mmask16 live, float* words) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, even));
  const __m512i high = odd ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, odd)) : _mm512_setzero_si512();
  _mm512_mask_storeu_epi32(words, live, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

static void pair_along(const Half*, int, float*) {}  // use_pairs() leaves fp16 alone
static FO_HD void pair_across(const Half*, const Half*, __mmask16, float*) {}

// The pairs of `pack_across`.
template <int Width, class T>
FO_PAIRS_TARGET static void pack_pairs_across(const T* row, int64_t stride, int depth, int columns, float* panels, int64_t panel) {
  constexpr int kPart = Width < 16 ? Width : 16;
  for (int k = 0; k < depth; k += 2, row += 2 * stride, panels += Width) {
    const T* odd = k + 1 < depth ? row + stride : nullptr;
    float* to = panels;
    int j = 0;
    for (; j + Width <= columns; j += Width, to += panel) {
      for (int part = 0; part < Width; part += kPart) {
        pair_across(row + j + part, odd ? odd + j + part : nullptr, __mmask16((1u << kPart) - 1), to + part);
      }
    }
    if (j == columns) continue;
    for (int part = 0; part < Width; part += kPart) {
      const int left = columns - j - part;
      const __mmask16 live = left <= 0 ? __mmask16(0) : left < kPart ? __mmask16((1u << left) - 1) : __mmask16((1u << kPart) - 1);
      std::memset(to + part, 0, sizeof(float) * kPart);
      pair_across(row + j + part, odd ? odd + j + part : nullptr, live, to + part);
    }
  }
}
#endif

// `depth` elements along k as words.
template <class T>
static void words_along(const T* x, bool pairs, int depth, float* words) {
#if FO_PAIRS
  if (pairs) return pair_along(x, depth, words);
#endif
  (void)pairs;
  widen(x, depth, words);
}

// Rows of memory, `columns` long, to panels [words][Width] that are `panel` floats apart; missing columns are 0.
template <int Width, class T>
static void pack_across(const T* row, int64_t stride, bool pairs, int depth, int columns, float* panels, int64_t panel) {
#if FO_PAIRS
  if (pairs) return pack_pairs_across<Width>(row, stride, depth, columns, panels, panel);
#endif
  (void)pairs;
  for (int k = 0; k < depth; ++k, row += stride, panels += Width) {
    float* to = panels;
    int j = 0;
    for (; j + Width <= columns; j += Width, to += panel) {
      if constexpr (sizeof(T) == 4) std::memcpy(to, row + j, sizeof(float) * Width);
      else for (int i = 0; i < Width; ++i) to[i] = value(row[j + i]);
    }
    if (j == columns) continue;
    for (int i = 0; i < Width; ++i) to[i] = j + i < columns ? value(row[j + i]) : 0.f;
  }
}

// to[k][i] = from[i][k] for 4 x 4 words.
static FO_HD void transpose4(const float* from, int from_stride, float* to, int to_stride) {
#if defined(__SSE2__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_stride), c = _mm_loadu_ps(from + 2 * from_stride);
  __m128 d = _mm_loadu_ps(from + 3 * from_stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + to_stride, b);
  _mm_storeu_ps(to + 2 * to_stride, c);
  _mm_storeu_ps(to + 3 * to_stride, d);
#else
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 4; ++k) std::memcpy(to + k * to_stride + i, from + i * from_stride + k, 4);
#endif
}

template <class T>
static void pack_right_as(const Operand& right, bool pairs, int64_t k, int depth, int64_t n, int columns, float* panels, float* rows) {
  const int words = words_of(pairs, depth);
  if (right.along_k) {
    for (int first = 0; first < columns; first += kCols, panels += (words + 1) * kCols) {
      for (int part = 0; part < kCols; part += 4) {  // rows of 4 columns, then their transpose
        for (int j = 0; j < 4; ++j) {
          float* row = rows + j * kStride;
          if (first + part + j < columns) words_along(at<T>(right, n + first + part + j, k), pairs, depth, row);
          else std::memset(row, 0, size_t(words) * 4);
        }
        int w = 0;
        for (; w + 4 <= words; w += 4) transpose4(rows + w, kStride, panels + w * kCols + part, kCols);
        for (; w < words; ++w)
          for (int j = 0; j < 4; ++j) std::memcpy(panels + w * kCols + part + j, rows + j * kStride + w, 4);
      }
    }
    return;
  }
  pack_across<kCols>(at<T>(right, k, n), right.stride, pairs, depth, columns, panels, int64_t(words + 1) * kCols);
}

void pack_right(const Operand& right, bool pairs, int64_t k, int depth, int64_t n, int columns, float* panels, float* scratch) {
  by_type(right.dtype, [&](auto type) {
    pack_right_as<decltype(type)>(right, pairs, k, depth, n, columns, panels, scratch);
  });
}

template <class T>
static void pack_left_as(const Operand& left, bool pairs, int64_t m, int rows, int64_t k, int depth, float* panels) {
  const int words = words_of(pairs, depth);
  if (!left.along_k) {
    return pack_across<kRows>(at<T>(left, k, m), left.stride, pairs, depth, rows, panels, int64_t(words) * kRows);
  }
  for (int i = 0; i < kRows; ++i) {
    if (i < rows) words_along(at<T>(left, m + i, k), pairs, depth, panels + i * kStride);
    else std::memset(panels + i * kStride, 0, size_t(words) * 4);
  }
}

void pack_left(const Operand& left, bool pairs, int64_t m, int rows, int64_t k, int depth, float* panels) {
  by_type(left.dtype, [&](auto type) { pack_left_as<decltype(type)>(left, pairs, m, rows, k, depth, panels); });
}

void multiply(const float* left, bool along_k, bool pairs, int rows, int words, const float* panels, int columns, float* c,
              int64_t ldc, bool add, Prefetch& ahead) {
  const Kernel run = along_k ? choose<kStride, 1>(pairs, rows) : choose<1, kRows>(pairs, rows);
  for (int j = 0; j < columns; j += kCols, panels += (words + 1) * kCols) {
    ahead.some();
    run(left, panels, c + j, words, ldc, add);
  }
}

}  // namespace fo
