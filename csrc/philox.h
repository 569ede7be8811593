// Philox4x32-10 counter-based random numbers: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
// key = seed; counter = (element / 8, tensor id, step): 16 bits for each of 8 consecutive elements, the same on every backend.
// The 8 highest bits of the octet's number are the stream: 0 for the parameter, 1 + i for state i.
#pragma once
#include "fusedopt.h"

namespace fo {

constexpr int kNoiseStream = 0xFD;  // of the noise that a rule takes (stages.h)

constexpr uint32_t kPhiloxA = 0xD2511F53u, kPhiloxB = 0xCD9E8D57u, kPhiloxKeyA = 0x9E3779B9u, kPhiloxKeyB = 0xBB67AE85u;

struct Random8 { uint32_t word[4]; };  // element e takes word[(e & 7) >> 1], the low half if e is even

struct OneWord {
  using Word = uint32_t;
  static FO_HD void multiply(uint32_t a, Word b, Word& high, Word& low) {
#if defined(__CUDA_ARCH__)
    high = __umulhi(a, b);
#else
    high = uint32_t((uint64_t(a) * b) >> 32);
#endif
    low = a * b;
  }
};

// Ten rounds on a counter of four words. Lanes is OneWord or says the same of a vector of words.
template <class Lanes>
FO_HD void philox_rounds(typename Lanes::Word (&c)[4], uint32_t k0, uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    typename Lanes::Word high0, low0, high1, low1;
    Lanes::multiply(kPhiloxA, c[0], high0, low0);
    Lanes::multiply(kPhiloxB, c[2], high1, low1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += kPhiloxKeyA;
    k1 += kPhiloxKeyB;
  }
}

FO_HD uint64_t stream_octet(uint64_t octet, int stream) { return octet | uint64_t(stream) << 56; }

FO_HD Random8 philox8(const Head& head, uint32_t tensor, uint64_t octet) {
  uint32_t c[4] = {uint32_t(octet), uint32_t(octet >> 32), tensor, head.step};
  philox_rounds<OneWord>(c, head.seed_lo, head.seed_hi);
  return {{c[0], c[1], c[2], c[3]}};
}

// What the rounds of all octets of a tensor share: half of the first round, and the keys of the others.
struct alignas(16) PhiloxKeys {
  uint32_t first, second, third, unused;  // of the counter's words after the first round, less what the octet gives
  uint32_t later[20];                     // two a round, nine rounds
};

FO_HD PhiloxKeys philox_keys(const Head& head, uint32_t tensor) {
  PhiloxKeys keys = {};
  uint32_t high;
  OneWord::multiply(kPhiloxB, tensor, high, keys.second);
  keys.first = high ^ head.seed_lo, keys.third = head.step ^ head.seed_hi;
  for (uint32_t i = 0; i < 9; ++i) {
    keys.later[2 * i] = head.seed_lo + (i + 1) * kPhiloxKeyA;
    keys.later[2 * i + 1] = head.seed_hi + (i + 1) * kPhiloxKeyB;
  }
  return keys;
}

// The same.
FO_HD Random8 philox8(const PhiloxKeys& keys, uint64_t octet) {
  uint32_t high0, low0, high1, low1;
  OneWord::multiply(kPhiloxA, uint32_t(octet), high0, low0);
  uint32_t c[4] = {keys.first ^ uint32_t(octet >> 32), keys.second, high0 ^ keys.third, low0};
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 0; i < 9; ++i) {
    OneWord::multiply(kPhiloxA, c[0], high0, low0);
    OneWord::multiply(kPhiloxB, c[2], high1, low1);
    c[0] = high1 ^ c[1] ^ keys.later[2 * i];
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ keys.later[2 * i + 1];
    c[3] = low0;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

FO_HD uint32_t uniform16(const Random8& r, int element) {
  uint32_t w = r.word[(element & 7) >> 1];
  return element & 1 ? w >> 16 : w & 0xFFFFu;
}

}  // namespace fo
