// int8: blockwise dynamic map, Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861).
//
// The map is piecewise linear: decade d holds 2^j equally spaced values, so codes are arithmetic instead of a table search.
// With k = code + 1 (unsigned) or |code - 127| (signed) and j = floor(log2 k), i = k - 2^j:
//   value(k) = 10^d (0.1 + 0.9 (i + 1/2) / 2^j),  d = j - 7 (unsigned, j = 1..7) or j - 6 (signed, j = 0..6);
//   the last k (256 or 128) is 1.0; unsigned code 0 and signed code 127 are 0; -1.0 has no code.
// Decoding and encoding are base[j] + i * step[j] and trunc((y - low[j]) * inverse[j]) with tables of 8 entries.
#pragma once
#include "scale.h"

namespace fo {

constexpr double pow10i(int d) {
  double x = 1;
  for (; d < 0; ++d) x /= 10;
  for (; d > 0; --d) x *= 10;
  return x;
}

// Index t counts decades from the smallest: t = j - 1 (unsigned) or j (signed).
struct Int8Map {
  float base[8], step[8];     // decode
  float low[8], inverse[8];   // encode: the start of decade t and 1 / step
  float threshold[8];         // encode: the midpoint where decade t begins; entry 0 of the signed map separates 0 from the first value
};

constexpr Int8Map make_int8_map(bool is_signed) {
  Int8Map m{};
  for (int t = 0; t < 8; ++t) {
    double n = double(1 << (is_signed ? t : t + 1)), scale = pow10i(t - 6);
    bool top = t == 7;
    m.base[t] = top ? 1.f : float(scale * (0.1 + 0.45 / n));
    m.step[t] = top ? 0.f : float(scale * 0.9 / n);
    m.low[t] = top ? 1.f : float(scale * 0.1);
    m.inverse[t] = top ? 0.f : float(n / (scale * 0.9));
    m.threshold[t] = t == 0 ? (is_signed ? float(scale * (0.1 + 0.45 / n) / 2) : 0.f)
                            : top ? float(1.0 - 0.45 / n) : float(scale * (0.1 + 0.18 / n));
  }
  return m;
}

// (5 * exponent + offset) >> 4 is the decade of 2^exponent or the one below it, for every exponent: one comparison settles which.
constexpr int kDecadeOffsetUnsigned = 124 - 5 * 127 - 16, kDecadeOffsetSigned = 105 - 5 * 127 + 16;

template <bool Signed>
FO_HD float int8_decode(uint8_t code, float scale, const Int8Map& map) {
  int k = Signed ? (code > 127 ? code - 127 : 127 - code) : code + 1;
  bool zero = Signed ? k == 0 : code == 0;
  uint32_t kb = bits(float(k));
  int t = (int(kb >> 23) - (Signed ? 127 : 128)) & 7;
  float value = map.base[t] + (float(k) - from_bits(kb & 0xFF800000u)) * map.step[t];
  value = zero ? 0.f : value;
  value = Signed && code < 127 ? -value : value;
  return value * scale;
}

// A second moment (unsigned) never becomes code 0 unless x is zero: an update m / sqrt(v) stays bounded.
template <bool Signed>
FO_HD uint8_t int8_encode(float x, float inverse, const Int8Map& map) {
  float y = from_bits(magnitude(x)) * inverse;
  y = y < 1.f ? y : 1.f;  // NaN too
  int t = (5 * int(bits(y) >> 23) + (Signed ? kDecadeOffsetSigned : kDecadeOffsetUnsigned)) >> 4;
  int top = Signed ? 7 : 6;
  t = t < 0 ? 0 : t > top ? top : t;
  if (Signed) {
    t += y >= map.threshold[t] ? 0 : -1;
    int s = t & 7;
    float last = float((1 << s) - 1), i = (y - map.low[s]) * map.inverse[s];
    i = i < last ? i : last;
    int k = t < 0 ? 0 : (1 << s) + int(i > 0.f ? i : 0.f);
    if (bits(x) >> 31) return uint8_t(127 - (k > 127 ? 127 : k));
    return uint8_t(127 + k);
  }
  t += y >= map.threshold[t + 1] ? 1 : 0;
  float last = float((2 << t) - 1), i = (y - map.low[t]) * map.inverse[t];
  i = i < last ? i : last;
  int code = (2 << t) + int(i > 0.f ? i : 0.f) - 1;
  return uint8_t(magnitude(x) >= kSmallest && inverse > 0.f ? code : 0);
}

}  // namespace fo
