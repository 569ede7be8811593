// Scalar math of the rules: IEEE on the CPU; on a GPU the 2-ulp division and 1-ulp square root, far inside the error bound of any rule.
// Both take subnormals as zero, like the CPU driver: support for them would triple their instructions.
#pragma once
#include "fusedopt.h"

#include <cmath>
#include <cstring>

namespace fo {

FO_HD float div(float a, float b) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a / b;
#endif
}

FO_HD float sqrt(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ::sqrtf(x);
#endif
}

FO_HD float sign(float x) { return (x > 0.f ? 1.f : 0.f) - (x < 0.f ? 1.f : 0.f); }  // sign(0) = 0
FO_HD float max(float a, float b) { return a > b ? a : b; }
FO_HD float min(float a, float b) { return a < b ? a : b; }

FO_HD uint32_t bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
#endif
}

FO_HD float from_bits(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, 4);
  return x;
#endif
}

FO_HD float abs(float x) { return from_bits(bits(x) & 0x7FFFFFFFu); }
// e^x for x <= 0, within 2 ulp: 2^n times a polynomial of the rest. Spelled out, since a call of expf keeps loops from being vectorised.
FO_HD float exp_of_negative(float x) {
  x = max(-87.f, x);
  float n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // the nearest whole number
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float poly = 1.f / 5040.f;
  poly = poly * r + 1.f / 720.f;
  poly = poly * r + 1.f / 120.f;
  poly = poly * r + 1.f / 24.f;
  poly = poly * r + 1.f / 6.f;
  poly = poly * r + 0.5f;
  poly = poly * r + 1.f;
  poly = poly * r + 1.f;
  return poly * from_bits(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// The cube root of x >= 0, within 2 ulp; zero below 2e-38. A first guess from the exponent (within 4 %), then Halley twice.
FO_HD float cube_root(float x) {
  float y = from_bits(static_cast<uint32_t>(static_cast<int32_t>(static_cast<float>(static_cast<int32_t>(bits(x))) * 0.333333333f) + 709921077));
  float cube = y * y * y;
  y = y * div(cube + 2.f * x, 2.f * cube + x);
  cube = y * y * y;
  y = y * div(cube + 2.f * x, 2.f * cube + x);
  return x >= 2e-38f ? y : x * 0.f;  // NaN stays NaN
}

FO_HD uint32_t magnitude(float x) { return bits(x) & 0x7FFFFFFFu; }

}  // namespace fo
