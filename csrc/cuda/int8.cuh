// The int8 dynamic map of formats.h for one lane's octet: the same codes, in arithmetic that suits a GPU (abs and negate are free
// operand modifiers, integer instructions run at half the rate of fp32, a 9-entry table in shared memory has no bank conflicts).
//
// With k as in formats.h, 2k + 1 = 2^e m, m in [1, 2): value = S[e] (0.9 m - 0.8), S[e] = 10^d; S also holds the two special values 0 and 1.
// Encoding: the exponent of y = |x| / absmax selects the only decade boundary in its octave; one comparison gives the decade, and
// k = trunc(y A[d] + B[d]). A boundary carries the number of the decade below it in its 4 lowest bits (a shift of 1e-6, at a tie).
#pragma once
#include "../formats.h"
#include "access.cuh"

namespace fo {

struct Line { float slope, offset; };

struct Int8Tables {
  uint32_t boundary_signed[512];    // by sign and exponent of y
  uint32_t boundary_unsigned[256];  // by exponent of y
  Line line_signed[10], line_unsigned[10];
  float decade_signed[10], decade_unsigned[10];  // S by e
};

// e-th octave: the boundary inside it, or one no y reaches; `below` is the decade at its start.
constexpr uint32_t octave_entry(int e, const double* boundaries, int count) {
  double start = 1;
  for (int i = e; i < 127; ++i) start /= 2;
  uint32_t below = 0;
  for (int i = 0; i < count && e <= 127; ++i) {
    if (boundaries[i] <= start) ++below;
    else if (boundaries[i] < 2 * start) return (uint32_t(e) << 23 | uint32_t((boundaries[i] / start - 1) * 8388608.0)) & ~15u | below;
  }
  return 0x7F000000u | below;
}

constexpr Int8Tables make_int8_tables() {
  Int8Tables t{};
  // Decade d of the signed map: 0 is the value 0, then n = 1, 2, .. 64 values, then 1.0. Unsigned: n = 2, 4, .. 128, 1.0, then 0.
  double edges_signed[8] = {}, edges_unsigned[7] = {};
  for (int d = 0; d < 7; ++d) {
    double scale = pow10i(d - 6), ns = double(1 << d), nu = double(2 << d);
    edges_signed[d] = d == 0 ? scale * 0.55 / 2 : scale * (0.1 + 0.18 / ns);
    if (d > 0) edges_unsigned[d - 1] = scale * (0.1 + 0.18 / nu);
    t.line_signed[d + 1] = {float(ns / (0.9 * scale)), float(ns * 8 / 9)};
    t.line_unsigned[d] = {float(nu / (0.9 * scale)), float(nu * 8 / 9)};
    t.decade_signed[d + 1] = float(scale);
    t.decade_unsigned[d + 2] = float(scale);
  }
  edges_signed[7] = 1 - 0.45 / 64;
  edges_unsigned[6] = 1 - 0.45 / 128;
  t.line_signed[0] = {0.f, 0.3f};
  t.line_signed[8] = {0.f, 128.3f};
  t.line_unsigned[7] = {0.f, 256.3f};
  t.line_unsigned[8] = {0.f, 1.3f};
  t.decade_signed[8] = float(1 / (0.9 * 257 / 256 - 0.8));
  t.decade_unsigned[9] = float(1 / (0.9 * 513 / 512 - 0.8));
  for (int e = 0; e < 256; ++e) {
    t.boundary_signed[e] = t.boundary_signed[e + 256] = octave_entry(e < 96 ? 96 : e, edges_signed, 8);
    t.boundary_unsigned[e] = e == 0 ? 0x7F000008u : octave_entry(e < 96 ? 96 : e, edges_unsigned, 7);
  }
  return t;
}

__device__ constexpr Int8Tables kInt8Tables = make_int8_tables();

// All threads of the CTA; the caller puts a barrier after it.
FO_DEV void copy_int8_tables(Int8Tables& shared) {
  for (int i = threadIdx.x; i < int(sizeof(Int8Tables) / 4); i += kThreads)
    reinterpret_cast<uint32_t*>(&shared)[i] = reinterpret_cast<const uint32_t*>(&kInt8Tables)[i];
}

FO_DEV uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, selector);
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

// Low byte: trunc(q + whole), 0 <= q + whole < 256.
FO_DEV uint32_t truncate_byte(float q, float whole) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(__fadd_rz(q, 8388608.f + whole));
#else
  return uint32_t(q + whole);
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

FO_DEV float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}

template <bool Signed>
FO_DEV void int8_decode8(float (&v)[kOctet], const Octet& o, float scale, const Int8Tables& t) {
  const float slope = 0.9f * scale, offset = -0.8f * scale;
#pragma unroll
  for (int i = kOctet - 1; i >= 0; --i) {
    float code = from_bits(select_bytes(o.word[i / 4], 0x4B000000u, 0x7440u | (i & 3)));  // 2^23 + code
    float twice = fmaf(code, 2.f, Signed ? -16777216.f - 254.f : -16777216.f + 3.f);      // 2 (code - 127), or 2 k + 1
    uint32_t odd = bits(Signed ? fabsf(twice) + 1.f : twice);
    float decade = (Signed ? t.decade_signed : t.decade_unsigned)[int(odd >> 23) - 127];
    float m = from_bits((odd & 0x007FFFFFu) | 0x3F800000u);
    float value = fmaf(m, slope, offset) * decade;
    v[i] = Signed ? from_bits(bits(value) ^ (bits(twice) & 0x80000000u)) : value;
  }
}

// A second moment (unsigned) never becomes code 0 unless x is zero, also where y underflows.
template <bool Signed>
FO_DEV Octet int8_encode8(const float (&x)[kOctet], float inverse, const Int8Tables& t) {
  Octet o;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t code[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float from = x[4 * half + i];
      // Also where NaN ends. -1 has no code: the lower limit lies in the cell of code 0.
      float y = Signed ? fmaxf(from * inverse, -0.99f) : fmaxf(fabsf(from) * inverse, fminf(fabsf(from), 1e-10f));
      uint32_t boundary = (Signed ? t.boundary_signed : t.boundary_unsigned)[bits(y) >> 23];
      int d = boundary & 15;
      if (fabsf(y) >= from_bits(boundary)) ++d;
      Line line = (Signed ? t.line_signed : t.line_unsigned)[d];
      float q = fmaf(fabsf(y), line.slope, line.offset);
      q = fminf(q, fmaf(line.offset, 2.25f, -0.5f));  // the last value of a decade also takes the gap after it
      code[i] = truncate_byte(q, Signed ? 0.f : -1.f);
    }
    uint32_t w = select_bytes(select_bytes(code[0], code[1], 0x0040), select_bytes(code[2], code[3], 0x0040), 0x5410);
    if (Signed) {  // 127 + k, or 127 - k = 255 - (k + 128)
      const float* f = x + 4 * half;
      uint32_t negative = select_bytes(select_bytes(bits(f[0]), bits(f[1]), 0x00FB), select_bytes(bits(f[2]), bits(f[3]), 0x00FB), 0x5410);
      w = (w + 0x7F7F7F7Fu + (negative & 0x01010101u)) ^ negative;
    }
    o.word[half] = w;
  }
  return o;
}

}  // namespace fo
