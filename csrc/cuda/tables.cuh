// Tables of the int8 and int4 maps for decoding and encoding without a search: built by the compiler, copied to shared memory by each CTA.
//
// int8, with k as in formats/int8.h, K = k / 2^126 and e its exponent, 0 to 9: value(k) = K P[e] + Q[e]; zero and 1.0 are entries of the same table.
// Encoding: y = |x| / scale falls into one of some hundred cells, none of which holds more than one of the map's boundaries; one load and
// one addition or comparison give the code. Cells must be narrow near 1, where relative steps of the map are least, and double with each
// decade below: their numbers grow with a power of y. A float's bits times a constant are (nearly) the bits of a power, and the sum with
// a large number has the cell in its lowest bits (Int8Cells).
#pragma once
#include "../formats.h"
#include "access.cuh"

namespace fo {

struct Line { float slope, offset; };

template <bool Signed>
struct Int8Cells {
  static constexpr uint32_t power = Signed ? 0x53D70A3Du : 0x5CED9168u;              // 0.327, 0.363 times 2^32: few cells, one boundary each
  static constexpr uint32_t large = Signed ? 57u << 23 : 60u << 23;                  // a float that is exact to one cell
  static constexpr int count = Signed ? 208 : 568;

  // A cell's number above that of the large number, in the low bits.
  static FO_DEV uint32_t number(float y) {
#if defined(__CUDA_ARCH__)
    const uint32_t powered = __umulhi(bits(y), power);
#else
    const uint32_t powered = uint32_t(uint64_t(bits(y)) * power >> 32);
#endif
    return bits(from_bits(powered) + from_bits(large));
  }

  // The same for the compiler, from the bits of y and less `large`; the sum rounds to even.
  static constexpr int cell(uint32_t y) {
    const uint32_t powered = uint32_t(uint64_t(y) * power >> 32);
    const int shift = int(large >> 23) - int(powered >> 23);
    if (shift > 25) return 0;
    const uint64_t whole = (powered & 0x7FFFFFu) | 0x800000u, half = uint64_t(1) << (shift - 1);
    return int((whole + half - 1 + (whole >> shift & 1)) >> shift);
  }
};

// Signed: y is |x| / scale and this, so that nothing of interest is smaller; what is added to y's bits carries into the highest byte, the
// code's, at the boundary, as long as they lie within two octaves of it. Unsigned: the boundary, with the code below it in its lowest byte.
constexpr float kInt8Floor = 1.1920929e-7f;  // 2^-23

struct alignas(256) CodeTables {                // so that addresses in the tables of int4 are base | offset
  Line decode_signed[16], decode_unsigned[16];  // P, Q by e
  uint32_t encode_signed[Int8Cells<true>::count];
  float int4_value[16];               // signed map by code
  uint32_t int4_boundary[64];         // of |code - 7|, by 4 bits of exponent and 2 of mantissa of |y| + 2^-8
  // 2^23 as bits. Were it visible to ptxas, it would take the immediate field of the byte permutations and each selector a register.
  uint32_t two_to_23[2];
  uint32_t less_large[2];             // -4 large of the unsigned and signed cells; visible, it would be an addition of its own each time
  uint32_t unused[156];
  Line decode_negative[16];           // of decode_signed where the sign is set
  uint32_t encode_unsigned[Int8Cells<false>::count];
};
static_assert(offsetof(CodeTables, decode_negative) == 256 * sizeof(Line), "the sign is the bit above e");

constexpr uint32_t float_bits(double x) {  // of a positive normal number, rounded to nearest
  int e = 127;
  for (; x < 1; x *= 2) --e;
  for (; x >= 2; x /= 2) ++e;
  return (uint32_t(e) << 23) + uint32_t((x - 1) * 8388608.0 + 0.5);
}

// Where the codes with k begin: half way between two values. k counts from 1 (signed) or 2, the code 1 of everything that is not 0.
constexpr double int8_boundary(int k, bool is_signed) {
  int j = 0;
  while (2 << j <= k) ++j;
  const double n = double(1 << j), scale = pow10i(is_signed ? j - 6 : j - 7);
  if (j == (is_signed ? 7 : 8)) return 1 - 0.45 / n;
  if (k == 1) return scale * 0.55 / 2;
  return scale * (0.1 + (k == 1 << j ? 0.18 / n : 0.9 * (k - n) / n));
}

constexpr uint32_t signed_boundary(int k) { return k > 128 ? 0x40000000u : float_bits(int8_boundary(k, true) + 1.0 / 8388608); }

constexpr uint32_t unsigned_boundary(int code) {  // the code below it lies in its lowest byte: it moves by at most 128 units
  if (code > 255) return 0x7F0000FFu;
  if (code == 1) return 0x100u;
  const uint32_t below = uint32_t(code - 1);
  return ((float_bits(int8_boundary(code + 1, false)) - below + 128) & ~255u) + below;
}

// Decade of n values from 10^d (0.1 + 0.45 / n) on; Q makes up for the rounding of P where 0.9 - 0.8 cancels.
constexpr Line decode_line(double n, double scale) {
  const double unit = 8.50705917302346159e37;  // 2^126
  float p = float(0.9 * scale / n * unit);
  return {p, float(scale * (0.1 + 0.45 / n) - n * (double(p) / unit))};
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
  t.less_large[0] = 0u - 4 * Int8Cells<false>::large, t.less_large[1] = 0u - 4 * Int8Cells<true>::large;
  for (int d = 0; d < 7; ++d) {  // decades of 1, 2, .. 64 values (signed) or 2, 4, .. 128
    const double scale = pow10i(d - 6);
    const Line line = decode_line(double(1 << d), scale);
    t.decode_signed[d + 1] = line;
    t.decode_negative[d + 1] = {line.slope, -line.offset};
    t.decode_unsigned[d + 2] = decode_line(double(2 << d), scale);
  }
  t.decode_signed[8] = t.decode_unsigned[9] = {0.f, 1.f};
  for (int cell = 0, k = 1; cell < Int8Cells<true>::count; ++cell) {
    t.encode_signed[cell] = (uint32_t(k) << 24) - signed_boundary(k);
    k += k <= 128 && Int8Cells<true>::cell(signed_boundary(k)) == cell;
  }
  for (int cell = 0, code = 1; cell < Int8Cells<false>::count; ++cell) {
    const bool holds = code <= 255 && Int8Cells<false>::cell(unsigned_boundary(code)) == cell;
    t.encode_unsigned[cell] = holds ? unsigned_boundary(code) : 0x7F000000u + uint32_t(code - 1);
    code += holds;
  }
  constexpr Int4Map map{};
  for (int c = 0; c < 16; ++c) t.int4_value[c] = c < 7 ? -map.value[7 - c] : map.value[c - 7];
  for (int c = 0; c < 64; ++c) t.int4_boundary[c] = int4_entry(c);
  return t;
}

__device__ constexpr CodeTables kCodeTables = make_code_tables();

// Every code is reached, so no cell holds two boundaries.
static_assert(kCodeTables.encode_signed[Int8Cells<true>::count - 1] == (129u << 24) - 0x40000000u, "two boundaries in a cell");
static_assert(kCodeTables.encode_unsigned[Int8Cells<false>::count - 1] == 0x7F0000FFu, "two boundaries in a cell");
static_assert(sizeof(CodeTables) % 16 == 0, "loads of 16 bytes");

// All threads of the CTA; the caller puts a barrier after it.
FO_DEV void copy_code_tables(CodeTables& shared) {
  constexpr int kPieces = sizeof(CodeTables) / 16;
#pragma unroll
  for (int first = 0; first < kPieces; first += kThreads)
    if (const int i = first + int(threadIdx.x); i < kPieces)
      reinterpret_cast<uint4*>(&shared)[i] = reinterpret_cast<const uint4*>(&kCodeTables)[i];
}

// Tables by 32-bit address: with C++ subscripts each access costs an addition of the base.
struct CodeView {
#if defined(__CUDA_ARCH__)
  uint32_t base;
  FO_DEV explicit CodeView(const CodeTables& t) : base(uint32_t(__cvta_generic_to_shared(&t))) {}
  // Spelled out, or the compiler takes the product apart into instructions of its own.
  template <uint32_t Bytes> static FO_DEV uint32_t entry(uint32_t first, uint32_t index) {
    uint32_t address;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(address) : "r"(index), "n"(Bytes), "r"(first));
    return address;
  }
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
  template <uint32_t Bytes> static uint32_t entry(uint32_t first, uint32_t index) { return first + Bytes * index; }
  template <size_t kTable> uint32_t word(uint32_t address) const { return *reinterpret_cast<const uint32_t*>(tables + kTable + address); }
  template <size_t kTable> Line line(uint32_t address) const { return *reinterpret_cast<const Line*>(tables + kTable + address); }
#endif
};

}  // namespace fo
