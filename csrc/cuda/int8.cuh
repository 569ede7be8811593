// The int8 dynamic map of formats.h for one lane's octet: the same codes, in arithmetic that suits a GPU, where abs and negate are
// free operand modifiers, integer instructions run at half the rate of fp32, and a small table in shared memory has no bank conflicts.
//
// With k as in formats.h and e the exponent of 4 k: value(k) = 4 k P[e] + Q[e]; zero and 1.0 are entries of the same table.
// Encoding: sign and exponent of y = x / absmax select the only decade boundary in y's octave; one comparison gives the decade d, and
// k = trunc(|y| A[d] + B[d]). A boundary carries 8 d of the decade below it in its 7 lowest bits (it moves by 1e-5 of itself, at a tie).
#pragma once
#include "../formats.h"
#include "access.cuh"

namespace fo {

struct Line { float slope, offset; };

struct alignas(2048) Int8Tables {     // aligned, so that an address is base | offset
  uint32_t boundary_signed[512];      // by sign and exponent of y
  uint32_t boundary_unsigned[256];    // by exponent of y
  Line encode_signed[16], encode_unsigned[16];  // A, B by decade
  Line decode_signed[16], decode_unsigned[16];  // P, Q by the low 4 bits of e: all that occur differ
  // 2^23 as bits. Were it visible to ptxas, it would take the immediate field of the byte permutations and each selector a register.
  uint32_t two_to_23[4];
};

constexpr uint32_t kDecadeBits = 0x78, kOctaveBits = 0x3FC, kSignedOctaveBits = 0x7FC;

// The boundary inside the octave 2^(e - 127), or one no y reaches; with the decade at the octave's start.
constexpr uint32_t octave_entry(int e, const double* boundaries, int count) {
  double start = 1;
  for (int i = e; i < 127; ++i) start /= 2;
  uint32_t below = 0;
  for (int i = 0; i < count; ++i) {
    if (boundaries[i] <= start) below += 8;
    else if (boundaries[i] < 2 * start) return ((uint32_t(e) << 23 | uint32_t((boundaries[i] / start - 1) * 8388608.0)) & ~127u) | below;
  }
  return 0x7F000000u | below;
}

// Decade of n values from 10^d (0.1 + 0.45 / n) on; Q makes up for the rounding of P where 0.9 - 0.8 cancels.
constexpr Line decode_line(double n, double scale) {
  float p = float(0.9 * scale / (4 * n));
  return {p, float(scale * (0.1 + 0.45 / n) - 4 * n * double(p))};
}

constexpr Int8Tables make_int8_tables() {
  Int8Tables t{};
  t.two_to_23[0] = 0x4B000000u;
  // Decades of the signed map: the value 0; 1, 2, .. 64 values; the value 1. Unsigned: the value 0; what lies below the first decade and
  // still is not 0; 2, 4, .. 128 values; the value 1. Constants between two integers leave room for rounding.
  double edges_signed[8] = {}, edges_unsigned[8] = {};
  for (int d = 0; d < 7; ++d) {
    double scale = pow10i(d - 6), ns = double(1 << d), nu = double(2 << d);
    edges_signed[d] = d == 0 ? scale * 0.55 / 2 : scale * (0.1 + 0.18 / ns);
    edges_unsigned[d] = d == 0 ? scale * 0.1 : scale * (0.1 + 0.18 / nu);
    t.encode_signed[d + 1] = {float(ns / (0.9 * scale)), float(ns * 8 / 9)};
    t.encode_unsigned[d + 2] = {float(nu / (0.9 * scale)), float(nu * 8 / 9)};
    t.decode_signed[d + 1] = decode_line(ns, scale);
    t.decode_unsigned[d + 2] = decode_line(nu, scale);
  }
  edges_signed[7] = 1 - 0.45 / 128;
  edges_unsigned[7] = 1 - 0.45 / 256;
  t.encode_signed[0] = {0.f, 0.3f};
  t.encode_signed[8] = {0.f, 128.3f};
  t.encode_unsigned[0] = {0.f, 1.3f};
  t.encode_unsigned[1] = {0.f, 2.3f};
  t.encode_unsigned[9] = {0.f, 256.3f};
  t.decode_signed[8] = t.decode_unsigned[9] = {0.f, 1.f};
  for (int e = 0; e < 256; ++e) {
    const int octave = e < 96 ? 96 : e > 127 ? 127 : e;  // below and above, nothing changes
    t.boundary_signed[e] = octave_entry(octave, edges_signed, 8);
    t.boundary_signed[e + 256] = octave_entry(octave, edges_signed, 7);  // -1 has no code
    t.boundary_unsigned[e] = octave_entry(octave, edges_unsigned, 8) + 8;
  }
  t.boundary_unsigned[0] = 1;  // the least positive y: only 0 is the value 0
  return t;
}

__device__ constexpr Int8Tables kInt8Tables = make_int8_tables();

static_assert(sizeof(Int8Tables) % 16 == 0 && sizeof(Int8Tables) / 16 <= kThreads, "one 16-byte load per thread");

// All threads of the CTA; the caller puts a barrier after it.
FO_DEV void copy_int8_tables(Int8Tables& shared) {
  if (threadIdx.x < sizeof(Int8Tables) / 16)
    reinterpret_cast<uint4*>(&shared)[threadIdx.x] = reinterpret_cast<const uint4*>(&kInt8Tables)[threadIdx.x];
}

// Tables by 32-bit address: with C++ subscripts each access costs an addition of the base.
struct Int8View {
#if defined(__CUDA_ARCH__)
  uint32_t base;
  FO_DEV explicit Int8View(const Int8Tables& t) : base(uint32_t(__cvta_generic_to_shared(&t))) {}
  template <size_t kTable> FO_DEV uint32_t word(uint32_t address) const {
    uint32_t x;
    asm("ld.shared.u32 %0, [%1 + %2];" : "=r"(x) : "r"(address), "n"(kTable));
    return x;
  }
  template <size_t kTable> FO_DEV Line line(uint32_t address) const {
    Line x;
    asm("ld.shared.v2.f32 {%0, %1}, [%2 + %3];" : "=f"(x.slope), "=f"(x.offset) : "r"(address), "n"(kTable));
    return x;
  }
#else
  const char* tables;
  static constexpr uint32_t base = 0;
  explicit Int8View(const Int8Tables& t) : tables(reinterpret_cast<const char*>(&t)) {}
  template <size_t kTable> uint32_t word(uint32_t address) const { return *reinterpret_cast<const uint32_t*>(tables + kTable + address); }
  template <size_t kTable> Line line(uint32_t address) const { return *reinterpret_cast<const Line*>(tables + kTable + address); }
#endif
};

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
FO_DEV void int8_decode8(float (&v)[kOctet], const Octet& o, float scale, const Int8View& t) {
  constexpr size_t kTable = Signed ? offsetof(Int8Tables, decode_signed) : offsetof(Int8Tables, decode_unsigned);
  const uint32_t two_to_23 = t.word<offsetof(Int8Tables, two_to_23)>(t.base);
#pragma unroll
  for (int i = kOctet - 1; i >= 0; --i) {
    float code = from_bits(select_bytes(o.word[i / 4], two_to_23, 0x7440u | (i & 3)));  // 2^23 + code
    float k4 = fmaf(code, 4.f, Signed ? -33554432.f - 508.f : -33554432.f + 4.f);   // exact: 4 (code - 127), or 4 (code + 1)
    Line line = t.line<kTable>(((bits(k4) >> 20) & kDecadeBits) | t.base);
    float value = fmaf(fabsf(k4), line.slope, line.offset) * scale;
    v[i] = Signed ? from_bits(bits(value) | (bits(k4) & 0x80000000u)) : value;
  }
}

// A second moment (unsigned) becomes code 0 only where y is 0, and y is 0 for no x above 7e-46 absmax.
template <bool Signed>
FO_DEV Octet int8_encode8(const float (&x)[kOctet], float inverse, const Int8View& t) {
  constexpr size_t kBoundary = Signed ? offsetof(Int8Tables, boundary_signed) : offsetof(Int8Tables, boundary_unsigned);
  constexpr size_t kTable = Signed ? offsetof(Int8Tables, encode_signed) : offsetof(Int8Tables, encode_unsigned);
  Octet o;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t code[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float y = x[4 * half + i] * inverse;
      const uint32_t boundary = t.word<kBoundary>(((bits(y) >> 21) & (Signed ? kSignedOctaveBits : kOctaveBits)) | t.base);
      uint32_t decade = (boundary & kDecadeBits) | t.base;
      if (fabsf(y) >= from_bits(boundary)) decade += 8;
      const Line line = t.line<kTable>(decade);
      float q = fmaf(fabsf(y), line.slope, line.offset);
      q = fminf(q, fmaf(line.offset, 2.25f, -0.5f));  // the last value of a decade also takes the gap after it; a NaN ends here
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
