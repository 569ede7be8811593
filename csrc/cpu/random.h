// The random bits of consecutive elements: Philox on vectors of 64-bit lanes, one octet of elements each.
#pragma once
#include "../philox.h"

#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fo {

// Octets in 64-bit lanes. The low half of a lane is a word; the high half is whatever the last product left there.
struct WordVector {
#if defined(__AVX512F__)
  typedef uint64_t Word __attribute__((vector_size(64)));
  static FO_HD Word product(Word a, Word b) { return (Word)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
  typedef uint64_t Word __attribute__((vector_size(32)));
  static FO_HD Word product(Word a, Word b) { return (Word)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__)
  typedef uint64_t Word __attribute__((vector_size(16)));
  static FO_HD Word product(Word a, Word b) { return (Word)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
  typedef uint64_t Word __attribute__((vector_size(16)));
  static FO_HD Word product(Word a, Word b) { return (a & 0xFFFFFFFFu) * b; }
#endif
  static constexpr int lanes = sizeof(Word) / 8;

  static FO_HD void multiply(uint32_t a, Word b, Word& high, Word& low) {
    low = product(b, Word{} + a);
    high = low >> 32;
  }
};

// 16 bits of a stream (philox.h) for each of n elements from element `start`, a multiple of 8. In little-endian memory the words
// of an octet are its elements' bits in order. `out` has room for whole vectors.
static inline void random_bits(const Head& head, uint32_t tensor, int stream, int64_t start, int n, uint16_t* out) {
  using Words = WordVector::Word;
  constexpr int lanes = WordVector::lanes;
  Words octet;
  for (int lane = 0; lane < lanes; ++lane) octet[lane] = stream_octet(uint64_t(start) / 8 + uint64_t(lane), stream);
  for (int i = 0; i < n; i += 8 * lanes, octet += lanes) {
    Words c[4] = {octet, octet >> 32, Words{} + tensor, Words{} + head.step};
    philox_rounds<WordVector>(c, head.seed_lo, head.seed_hi);
    const Words first = (c[0] & 0xFFFFFFFFu) | c[1] << 32, second = (c[2] & 0xFFFFFFFFu) | c[3] << 32;
    uint64_t pairs[2 * lanes];
    for (int lane = 0; lane < lanes; ++lane) {
      pairs[2 * lane] = first[lane];
      pairs[2 * lane + 1] = second[lane];
    }
    std::memcpy(out + i, pairs, sizeof pairs);
  }
}

}  // namespace fo
