// Philox4x32-10 counter-based random numbers: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
// key = seed; counter = (element / 8, tensor id, step): 16 bits for each of 8 consecutive elements, the same on every backend.
#pragma once
#include "fusedopt.h"

namespace fo {

struct Random8 { uint32_t word[4]; };  // element e takes word[(e & 7) >> 1], the low half if e is even

FO_HD uint32_t mul_high(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return uint32_t((uint64_t(a) * b) >> 32);
#endif
}

FO_HD Random8 philox8(const Head& head, uint32_t tensor, uint64_t octet) {
  uint32_t c0 = uint32_t(octet), c1 = uint32_t(octet >> 32), c2 = tensor, c3 = head.step, k0 = head.seed_lo, k1 = head.seed_hi;
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    uint32_t hi0 = mul_high(0xD2511F53u, c0), lo0 = 0xD2511F53u * c0;
    uint32_t hi1 = mul_high(0xCD9E8D57u, c2), lo1 = 0xCD9E8D57u * c2;
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

FO_HD uint32_t uniform16(const Random8& r, int element) {
  uint32_t w = r.word[(element & 7) >> 1];
  return element & 1 ? w >> 16 : w & 0xFFFFu;
}

}  // namespace fo
