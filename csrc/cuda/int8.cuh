// The int8 dynamic map of formats/int8.h for one lane's octet: the same codes, in arithmetic that suits a GPU, where abs and negate are
// free operand modifiers, integer instructions run at half the rate of fp32, and a load from shared memory is cheaper than the arithmetic that it replaces.
#pragma once
#include "bytes.cuh"
#include "tables.cuh"

namespace fo {

template <bool Signed>
FO_DEV void int8_decode8(float (&v)[kOctet], const Octet& o, float scale, const CodeView& t) {
  constexpr size_t kTable = Signed ? offsetof(CodeTables, decode_signed) : offsetof(CodeTables, decode_unsigned);
  const uint32_t two_to_23 = t.word<offsetof(CodeTables, two_to_23)>(t.base);
  constexpr float kUnit = 1.17549435e-38f;  // 2^-126: exponents begin at 1
#pragma unroll
  for (int i = kOctet - 1; i >= 0; --i) {
    const float code = from_bits(select_bytes(o.word[i / 4], two_to_23, 0x7440u | (i & 3)));  // 2^23 + code
    const float k = fmaf(code, kUnit, (Signed ? -8388608.f - 127.f : -8388608.f + 1.f) * kUnit);  // exact
    const Line line = t.line<kTable>(t.entry<sizeof(Line)>(t.base, bits(k) >> 23));
    v[i] = fmaf(k, line.slope, line.offset) * scale;
  }
}

// A second moment (unsigned) becomes code 0 only where y has fewer than 9 bits: for no x from 2^-126 on (kExtreme in codec.cuh).
template <bool Signed>
FO_DEV Octet int8_encode8(const float (&x)[kOctet], float inverse, const CodeView& t) {
  using Cells = Int8Cells<Signed>;
  const uint32_t cells = t.base + t.word<offsetof(CodeTables, less_large) + 4 * Signed>(t.base);
  Octet o = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* f = x + 4 * half;
    uint32_t code[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (Signed) {
        const float y = fmaf(fabsf(f[i]), inverse, kInt8Floor);
        code[i] = bits(y) + t.word<offsetof(CodeTables, encode_signed)>(t.entry<4>(cells, Cells::number(y)));
      } else {
        const float y = fabsf(f[i] * inverse);
        code[i] = t.word<offsetof(CodeTables, encode_unsigned)>(t.entry<4>(cells, Cells::number(y)));
        if (y >= from_bits(code[i])) code[i] += 1;
      }
    }
    if (Signed) {  // 127 + k, or 127 - k = 255 - (k + 128); -1 has no code, so of a negative 128 only 127 is taken
      const uint32_t negative = sign_bytes(f[0], f[1], f[2], f[3]), k = pack_highest(code[0], code[1], code[2], code[3]);
      o.word[half] = (k + 0x7F7F7F7Fu + (negative & ~(k >> 7) & 0x01010101u)) ^ negative;
    } else {
      o.word[half] = pack_bytes(code[0], code[1], code[2], code[3]);
    }
  }
  return o;
}

}  // namespace fo
