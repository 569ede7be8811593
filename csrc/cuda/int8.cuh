// The int8 dynamic map of formats/int8.h for one lane's octet: the same codes, in arithmetic that suits a GPU, where abs and negate are
// free operand modifiers, integer instructions run at half the rate of fp32, and a small table in shared memory has no bank conflicts.
#pragma once
#include "bytes.cuh"
#include "tables.cuh"

namespace fo {

template <bool Signed>
FO_DEV void int8_decode8(float (&v)[kOctet], const Octet& o, float scale, const CodeView& t) {
  constexpr size_t kTable = Signed ? offsetof(CodeTables, decode_signed) : offsetof(CodeTables, decode_unsigned);
  const uint32_t two_to_23 = t.word<offsetof(CodeTables, two_to_23)>(t.base);
#pragma unroll
  for (int i = kOctet - 1; i >= 0; --i) {
    float code = from_bits(select_bytes(o.word[i / 4], two_to_23, 0x7440u | (i & 3)));  // 2^23 + code
    float k4 = fmaf(code, 4.f, Signed ? -33554432.f - 508.f : -33554432.f + 4.f);   // exact: 4 (code - 127), or 4 (code + 1)
    Line line = t.line<kTable>(((bits(k4) >> 20) & kDecadeBits) | t.base);
    float value = fmaf(fabsf(k4), line.slope, line.offset) * scale;
    v[i] = Signed ? from_bits(bits(value) | (bits(k4) & 0x80000000u)) : value;
  }
}

// A second moment (unsigned) becomes code 0 only where y is 0: for no x from 2^-126 on (kExtreme in codec.cuh).
template <bool Signed>
FO_DEV Octet int8_encode8(const float (&x)[kOctet], float inverse, const CodeView& t) {
  constexpr size_t kBoundary = Signed ? offsetof(CodeTables, boundary_signed) : offsetof(CodeTables, boundary_unsigned);
  constexpr size_t kTable = Signed ? offsetof(CodeTables, encode_signed) : offsetof(CodeTables, encode_unsigned);
  Octet o = {};
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
      q = fminf(q, fmaf(line.offset, 2.25f, -0.5f));  // the last value of a decade also takes the gap after it
      code[i] = truncate_byte(q, Signed ? 0.f : -1.f);
    }
    uint32_t w = pack_bytes(code[0], code[1], code[2], code[3]);
    if (Signed) {  // 127 + k, or 127 - k = 255 - (k + 128)
      const float* f = x + 4 * half;
      const uint32_t negative = sign_bytes(f[0], f[1], f[2], f[3]);
      w = (w + 0x7F7F7F7Fu + (negative & 0x01010101u)) ^ negative;
    }
    o.word[half] = w;
  }
  return o;
}

}  // namespace fo
