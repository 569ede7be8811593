// Bytes of words, and the approximate functions of the codecs, with the same results on the host but for the last bits.
#pragma once
#include "../scalar.h"
#include "platform.cuh"

namespace fo {

// prmt: a nibble of the selector names a byte of (a, b); with its top bit set, that byte's sign fills the result's
// (the intrinsic __byte_perm drops that bit).
FO_DEV uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
#else
  uint64_t pair = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t s = selector >> (4 * i), byte = uint32_t(pair >> (8 * (s & 7))) & 0xFF;
    out |= (s & 8 ? (byte >> 7) * 0xFFu : byte) << (8 * i);
  }
  return out;
#endif
}

FO_DEV uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {  // their low bytes, a lowest
  return select_bytes(select_bytes(a, b, 0x0040), select_bytes(c, d, 0x0040), 0x5410);
}

FO_DEV uint32_t pack_highest(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {  // their high bytes
  return select_bytes(select_bytes(a, b, 0x0073), select_bytes(c, d, 0x0073), 0x5410);
}

FO_DEV uint32_t sign_bytes(float a, float b, float c, float d) {  // 0xFF for each whose sign bit is set
  return select_bytes(select_bytes(bits(a), bits(b), 0x00FB), select_bytes(bits(c), bits(d), 0x00FB), 0x5410);
}

// Low byte: trunc(q + whole), 0 <= q + whole < 256.
FO_DEV uint32_t truncate_byte(float q, float whole) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(__fadd_rz(q, 8388608.f + whole));
#else
  return uint32_t(q + whole);
#endif
}

FO_DEV uint32_t max_of_three(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  return __vimax3_u32(a, b, c);  // one instruction from sm_90 on
#else
  return a > b ? (a > c ? a : c) : b > c ? b : c;
#endif
}

FO_DEV float max_magnitude(float a, float b) {  // a NaN stays
#if defined(__CUDA_ARCH__)
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(fabsf(b)));
  return out;
#else
  return from_bits(magnitude(a) > magnitude(b) ? magnitude(a) : magnitude(b));
#endif
}

FO_DEV float reciprocal_of_normal(float x) {  // flushes subnormals, which saves the scaling around them
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}

}  // namespace fo
