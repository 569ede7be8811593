// Tables of the int8 and int4 maps for decoding and encoding without a search: built by the compiler, copied to shared memory by each CTA.
//
// int8, with k as in formats/int8.h and e the exponent of 4 k: value(k) = 4 k P[e] + Q[e]; zero and 1.0 are entries of the same table.
// Encoding: sign and exponent of y = x / scale select the only decade boundary in y's octave; one comparison gives the decade d, and
// k = trunc(|y| A[d] + B[d]). A boundary carries 8 d of the decade below it in its 7 lowest bits (it moves by 1e-5 of itself, at a tie).
#pragma once
#include "../formats.h"
#include "access.cuh"

namespace fo {

struct Line { float slope, offset; };

struct alignas(2048) CodeTables {     // aligned, so that an address is base | offset (of one table: less than 2048)
  uint32_t boundary_signed[512];      // by sign and exponent of y
  uint32_t boundary_unsigned[256];    // by exponent of y
  Line encode_signed[16], encode_unsigned[16];  // A, B by decade
  Line decode_signed[16], decode_unsigned[16];  // P, Q by the low 4 bits of e: all that occur differ
  float int4_value[16];               // signed map by code
  uint32_t int4_boundary[64];         // of |code - 7|, by 4 bits of exponent and 2 of mantissa of |y| + 2^-8
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

// In a quarter of an octave of |y| + 2^-8 lies at most one of the eight boundaries; it carries in its 4 lowest bits how many lie below.
constexpr uint32_t int4_entry(int cell) {
  constexpr Int4Map map{};
  const int exponent = 112 + (cell >> 2);  // what occurs, 2^-8 to 1 + 2^-8, is cells 28 to 60
  double octave = 1;
  for (int e = exponent; e < 127; ++e) octave /= 2;
  const double start = octave * (1 + 0.25 * (cell & 3)), end = start + 0.25 * octave;
  uint32_t below = 0;
  for (int i = 0; i < 8; ++i) {
    const double boundary = double(map.boundary[i]) + 0.00390625;
    if (boundary <= start) ++below;
    else if (boundary < end) return ((uint32_t(exponent) << 23 | uint32_t((boundary / octave - 1) * 8388608.0)) & ~15u) | below;
  }
  return 0x7F000000u | below;
}

constexpr CodeTables make_code_tables() {
  CodeTables t{};
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
  constexpr Int4Map map{};
  for (int c = 0; c < 16; ++c) t.int4_value[c] = c < 7 ? -map.value[7 - c] : map.value[c - 7];
  for (int c = 0; c < 64; ++c) t.int4_boundary[c] = int4_entry(c);
  return t;
}

__device__ constexpr CodeTables kCodeTables = make_code_tables();

static_assert(sizeof(CodeTables) % 16 == 0 && sizeof(CodeTables) / 16 <= kThreads, "one 16-byte load per thread");

// All threads of the CTA; the caller puts a barrier after it.
FO_DEV void copy_code_tables(CodeTables& shared) {
  if (threadIdx.x < sizeof(CodeTables) / 16)
    reinterpret_cast<uint4*>(&shared)[threadIdx.x] = reinterpret_cast<const uint4*>(&kCodeTables)[threadIdx.x];
}

// Tables by 32-bit address: with C++ subscripts each access costs an addition of the base.
struct CodeView {
#if defined(__CUDA_ARCH__)
  uint32_t base;
  FO_DEV explicit CodeView(const CodeTables& t) : base(uint32_t(__cvta_generic_to_shared(&t))) {}
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
  explicit CodeView(const CodeTables& t) : tables(reinterpret_cast<const char*>(&t)) {}
  template <size_t kTable> uint32_t word(uint32_t address) const { return *reinterpret_cast<const uint32_t*>(tables + kTable + address); }
  template <size_t kTable> Line line(uint32_t address) const { return *reinterpret_cast<const Line*>(tables + kTable + address); }
#endif
};

}  // namespace fo
