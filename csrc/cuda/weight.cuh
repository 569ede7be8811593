// A lane's octet of weights: the parameter alone, or with its companion (Precision in fusedopt.h).
#pragma once
#include "access.cuh"

namespace fo {

FO_DEV bool has_companion(int precision) { return precision >= kKahan; }
FO_DEV int companion_shift(int precision) { return precision == kMaster ? 3 : precision == kSplit24 ? 1 : 2; }

// Half i of an octet of 16-bit words that begins at word `first`.
FO_DEV uint16_t half_word(const Octet& o, int first, int i) { return uint16_t(o.word[first + i / 2] >> (16 * (i & 1))); }
FO_DEV float widen_half(uint16_t h, int dtype) { return dtype == kBF16 ? bf16_to_float(h) : widen_f16(h); }

template <bool Full>
FO_DEV Octet load_octet_or_part(const Stream& s, uint32_t element, int live) {
  return Full ? load_octet(s, element) : load_octet_masked(s, element, live);
}

template <bool Full>
FO_DEV void load_raw_weight(Octet& raw, const Stream& param, const Stream& companion, int precision, uint32_t element, int live) {
  raw = {};
  if (precision != kMaster) raw = load_octet_or_part<Full>(param, element, live);
  if (has_companion(precision)) {
    const Octet o = load_octet_or_part<Full>(companion, element, live);
    if (precision == kMaster) raw = o;
    else raw.word[4] = o.word[0], raw.word[5] = o.word[1], raw.word[6] = o.word[2], raw.word[7] = o.word[3];
  }
}

// raw: the parameter in words 0..3 and its companion in words 4..7; with a master weight that alone.
FO_DEV void load_weight(float (&p)[kOctet], const Octet& raw, int dtype, int precision) {
  if (precision == kKahan) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) p[i] = widen_half(half_word(raw, 0, i), dtype) + widen_half(half_word(raw, 4, i), dtype);
  } else if (precision == kSplit32) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) p[i] = join(half_word(raw, 0, i), int16_t(half_word(raw, 4, i)));
  } else if (precision == kSplit24) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) p[i] = join(half_word(raw, 0, i), int32_t(int8_t(raw.word[4 + i / 4] >> (8 * (i & 3)))) * 256);
  } else {
    widen(p, raw, precision == kMaster ? kF32 : dtype);
  }
}

// The parameter; into `companion` its companion. p may change. random: a stream's bits for the octet.
template <class Random>
FO_DEV Octet store_weight(float (&p)[kOctet], int dtype, int precision, const Random& random, Octet& companion) {
  Octet out = {};
  if (dtype != kF32 && (precision == kStochastic || precision == kKahan)) {
    if (precision == kKahan) {
      out = narrow(p, dtype);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) p[i] = remainder(p[i], widen_half(half_word(out, 0, i), dtype));
    }
    companion = narrow_stochastic(p, dtype, random(0));
    if (precision == kStochastic) out = companion;
  } else if (precision == kSplit24) {
    const Random8 r = random(0);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const Split s = split24(p[i], uniform16(r, i));
      out.word[i / 2] = i & 1 ? out.word[i / 2] | uint32_t(s.high) << 16 : s.high;
      companion.word[i / 4] |= uint32_t(uint8_t(s.low)) << (8 * (i & 3));
    }
  } else if (precision == kSplit32) {
#pragma unroll
    for (int i = 0; i < kOctet; i += 2) {
      const Split a = split32(p[i]), b = split32(p[i + 1]);
      out.word[i / 2] = a.high | uint32_t(b.high) << 16;
      companion.word[i / 2] = uint16_t(a.low) | uint32_t(uint16_t(b.low)) << 16;
    }
  } else {
    if (precision == kMaster) companion = narrow(p, kF32);
    out = narrow(p, dtype);
  }
  return out;
}

}  // namespace fo
