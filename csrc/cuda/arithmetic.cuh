// int8c, fp8 and int4 of formats/ for one lane's octet: the same codes without a branch or a search, for finite values of at most the
// block's scale (codec.cuh sees to that). The sum of a value and a large constant is what rounds: its low bits are the code.
#pragma once
#include "bytes.cuh"
#include "tables.cuh"

namespace fo {

constexpr float kTwoTo23 = 8388608.f;

FO_DEV bool is_present(float x) { return fabsf(x) >= 1.17549435e-38f; }  // a second moment that is not zero

// 2^23 + byte i of the word
FO_DEV float byte_from_2_23(uint32_t word, int i, uint32_t two_to_23) { return from_bits(select_bytes(word, two_to_23, 0x7440u | (i & 3))); }

template <bool Signed>
FO_DEV void int8c_decode8(float (&v)[kOctet], const Octet& o, float scale, const CodeView& t) {
  const uint32_t two_to_23 = t.word<offsetof(CodeTables, two_to_23)>(t.base);
#pragma unroll
  for (int i = kOctet - 1; i >= 0; --i) {
    if (Signed) {
      const float q = byte_from_2_23(o.word[i / 4] ^ 0x80808080u, i, two_to_23) - (kTwoTo23 + 128.f);
      v[i] = q * reciprocal_of_normal(254.f - fabsf(q)) * scale;
    } else {
      constexpr float step = 1.f / 255.f;
      const float w = fmaf(byte_from_2_23(o.word[i / 4], i, two_to_23), step, -kTwoTo23 * step);  // code / 255, rounded once
      v[i] = w * w * scale;
    }
  }
}

template <bool Signed>
FO_DEV Octet int8c_encode8(const float (&x)[kOctet], float inverse) {
  Octet o = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t code[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float f = x[4 * half + i], y = f * inverse;
      if (Signed) {
        code[i] = bits(fmaf(y * reciprocal_of_normal(1.f + fabsf(y)), 254.f, 1.5f * kTwoTo23));  // two's complement
      } else {
        const uint32_t q = bits(fmaxf(fmaf(sqrt(fabsf(y)), 255.f, kTwoTo23), kTwoTo23 + 1.f));
        code[i] = is_present(f) ? q : 0u;
      }
    }
    o.word[half] = pack_bytes(code[0], code[1], code[2], code[3]);
  }
  return o;
}

template <bool Signed>
FO_DEV void fp8_decode8(float (&v)[kOctet], const Octet& o, float scale) {
#pragma unroll
  for (int i = kOctet - 1; i >= 0; --i) {
    const uint32_t top = select_bytes(o.word[i / 4], 0u, (i & 3) << 12 | 0x444u);  // the code in the highest byte
    if (Signed) {  // as the bits of a float of exponent bias 127 instead of 7: code subnormals are float subnormals
      const float value = from_bits(uint32_t(int32_t(top) >> 4) & 0x87F00000u);
      v[i] = value * (1.32922799578e36f / 448.f) * scale;  // 2^120
    } else {
      const float value = from_bits((top >> 4) + (96u << 23));
      v[i] = (top ? value * (1.f / 1.875f) : 0.f) * scale;
    }
  }
}

// With z in units of the code and 2^e at or below it, z + 2^(e + 20) has z / 2^(e - 3) in its low bits, rounded to even. Adding
// 8 e to that joins exponent and mantissa, and a mantissa that rounds up to 16 carries; `Bias` is what makes the low byte the code.
template <uint32_t Bias>
FO_DEV uint32_t fp8_code(float z, uint32_t exponent) {
  return bits(fabsf(z) + from_bits(exponent + (20u << 23) + Bias)) + (exponent >> 20);
}

template <bool Signed>
FO_DEV Octet fp8_encode8(const float (&x)[kOctet], float inverse) {
  Octet o = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* f = x + 4 * half;
    uint32_t code[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (Signed) {  // below 2^-6 the spacing stays: subnormals
        const float z = f[i] * inverse * 448.f;
        const uint32_t exponent = bits(z) & 0x7F800000u;
        code[i] = fp8_code<56>(z, exponent > (121u << 23) ? exponent : 121u << 23);
      } else {
        const float z = fmaxf(fabsf(f[i] * inverse) * 1.875f, 1.125f / 2147483648.f);  // at least code 1
        code[i] = is_present(f[i]) ? fp8_code<248>(z, bits(z) & 0x7F800000u) : 0u;
      }
    }
    uint32_t w = pack_bytes(code[0], code[1], code[2], code[3]);
    if (Signed) w |= (w + 0x7F7F7F7Fu) & 0x80808080u & sign_bytes(f[0], f[1], f[2], f[3]);  // zero has no sign
    o.word[half] = w;
  }
  return o;
}

// int4: a lane's octet is one word; see access.cuh for how two lanes share an access.
template <bool Signed>
FO_DEV void int4_decode8(float (&v)[kOctet], uint32_t word, float scale, const CodeView& t) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const int at = 4 * (i ^ 1);  // the even element in the high half of its byte
    if (Signed) {
      const uint32_t address = ((at ? word >> (at - 2) : word << 2) & 0x3Cu) | t.base;
      v[i] = from_bits(t.word<offsetof(CodeTables, int4_value)>(address)) * scale;
    } else {
      v[i] = fmaf(from_bits(((word >> at) & 15u) | 0x4B000000u), 0.0625f, -0.0625f * (kTwoTo23 - 1.f)) * scale;
    }
  }
}

template <bool Signed>
FO_DEV uint32_t int4_encode8(const float (&x)[kOctet], float inverse, const CodeView& t) {
  uint32_t word[2];
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    const float* f = x + odd;
    uint32_t code[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (Signed) {
        const float shifted = fmaf(fabsf(f[2 * i]), inverse, 0.00390625f);
        code[i] = t.word<offsetof(CodeTables, int4_boundary)>(((bits(shifted) >> 19) & 0xFCu) | t.base);
        if (shifted >= from_bits(code[i])) code[i] += 1;
      } else {
        code[i] = truncate_byte(fmaxf(fmaf(fabsf(f[2 * i] * inverse), 16.f, -0.5f), 0.f), 0.f);
      }
    }
    uint32_t w = pack_bytes(code[0], code[1], code[2], code[3]);
    if (Signed) {  // k = |code - 7|: 7 + k, or 7 - k = 15 - (k + 8); -1 has no code, so of a negative 8 only 7 is taken
      const uint32_t negative = sign_bytes(f[0], f[2], f[4], f[6]);
      w = ((w & 0x0F0F0F0Fu) + 0x07070707u + (negative & ~(w >> 3) & 0x01010101u)) ^ (negative & 0x0F0F0F0Fu);
    }
    word[odd] = w;
  }
  return word[0] * 16u + word[1];
}

}  // namespace fo
