// Gaussian numbers from random words by Box and Muller (1958): own polynomials for the logarithm, the sine and the cosine, which
// compilers vectorise, all within 4e-7 of the value, relatively. Kernels in Triton take the same (kernels/normal.py).
#pragma once
#include "scalar.h"

namespace fo {

// sqrt(scale * ln(n / 2^24)) with n = (word >> 8) + 1, exact in fp32, and scale < 0. n = 2^e m with m in [sqrt(1/2), sqrt(2)).
FO_HD float radius(uint32_t word, float scale) {
  const float n = float(int32_t(word >> 8) + 1);
  const int32_t exponent = (int32_t(bits(n)) - 0x3F3504F3) >> 23;
  const float m = from_bits(bits(n) - uint32_t(exponent * (1 << 23)));
  const float e = float(exponent - 24), f = m - 1.f, square = f * f;
  float q = -0.0785962492f;
  q = q * f + 0.128816664f;
  q = q * f - 0.13128759f;
  q = q * f + 0.141811892f;
  q = q * f - 0.166245535f;
  q = q * f + 0.200022861f;
  q = q * f - 0.250008106f;
  q = q * f + 0.333333164f;
  // ln 2 in two parts, the first of 9 bits: e times it is exact
  const float log = e * 0.693359375f + (f + (square * (q * f - 0.5f) - e * 2.12194440e-4f));
  return sqrt(scale * log);
}

// Cosine and sine of 2 pi (word >> 8) / 2^24: those of the rest to the nearest quarter turn, exchanged and with signs.
FO_HD void turn(uint32_t word, float& cosine, float& sine) {
  const int32_t a = int32_t(word >> 8), quarter = (a + (1 << 21)) >> 22;
  const float x = float(a - quarter * (1 << 22)) * 3.74507039e-7f, t = x * x;
  const float s = x + x * t * (-0.166666552f + t * (0.008332178f + t * -0.000195172650f));
  const float c = 1.f + t * (-0.5f + t * (0.0416666456f + t * (-0.0013887367f + t * 2.44384155e-5f)));
  const float first = quarter & 1 ? s : c, second = quarter & 1 ? c : s;
  cosine = (quarter + 1) & 2 ? -first : first;
  sine = quarter & 2 ? -second : second;
}

// The noise of two neighbouring elements from their 16 random bits (philox.h): the even one's give the radius, at most 4.9, the odd
// one's the angle, each at the middle of its 2^-16.
FO_HD Pair normal_pair(uint32_t even, uint32_t odd) {
  const float r = radius(even << 16 | 0x8000u, -2.f);
  float cosine, sine;
  turn(odd << 16 | 0x8000u, cosine, sine);
  return {r * cosine, r * sine};
}

}  // namespace fo
