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

// join of precision.h. Low bits with their top bit flipped lie beside the high half as they are, 2^15 too high. A bf16 that was zeroed
// beside negative low bits gives a NaN this way, so only an octet with a NaN is looked at again.
FO_DEV void join_split(float (&p)[kOctet], const Octet& raw, int precision) {
#pragma unroll
  for (int i = 0; i < kOctet; i += 2) {
    const uint32_t bytes = raw.word[4 + i / 4] ^ 0x80808080u;
    const uint32_t low = precision == kSplit32 ? raw.word[4 + i / 2] ^ 0x80008000u : select_bytes(bytes, 0u, i & 2 ? 0x3424 : 0x1404);
    p[i] = from_bits(select_bytes(low, raw.word[i / 2], 0x5410) - 0x8000u);
    p[i + 1] = from_bits(select_bytes(low, raw.word[i / 2], 0x7632) - 0x8000u);
  }
  if (any_nan(p)) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const int32_t low = precision == kSplit32 ? int32_t(int16_t(half_word(raw, 4, i))) : int32_t(int8_t(raw.word[4 + i / 4] >> (8 * (i & 3)))) * 256;
      p[i] = join(half_word(raw, 0, i), low);
    }
  }
}

// split24 and split32 of precision.h: in bits + 2^15 the high half is rounded and the low bits have their top bit flipped.
FO_DEV Octet store_split(float (&p)[kOctet], int precision, const Random8& random, Octet& companion) {
  if (any_nan(p)) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) p[i] = from_bits(split_bits(p[i]));
  }
  Octet out = {};
  uint32_t w[kOctet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const uint32_t r = precision == kSplit32 ? 0u : i & 1 ? random.word[i / 2] >> 24 : random.word[i / 2] >> 8 & 0xFFu;
    w[i] = bits(p[i]) + 0x8000u + r;
  }
#pragma unroll
  for (int i = 0; i < kOctet; i += 2) {
    out.word[i / 2] = select_bytes(w[i], w[i + 1], 0x7632);
    if (precision == kSplit32) companion.word[i / 2] = select_bytes(w[i], w[i + 1], 0x5410) ^ 0x80008000u;
  }
  if (precision == kSplit24) {
#pragma unroll
    for (int i = 0; i < kOctet; i += 4)
      companion.word[i / 4] = select_bytes(select_bytes(w[i], w[i + 1], 0x0051), select_bytes(w[i + 2], w[i + 3], 0x0051), 0x5410) ^ 0x80808080u;
  }
  return out;
}

// raw: the parameter in words 0..3 and its companion in words 4..7; with a master weight that alone.
FO_DEV void load_weight(float (&p)[kOctet], const Octet& raw, int dtype, int precision) {
  if (precision == kKahan) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) p[i] = widen_half(half_word(raw, 0, i), dtype) + widen_half(half_word(raw, 4, i), dtype);
  } else if (precision == kSplit32 || precision == kSplit24) {
    join_split(p, raw, precision);
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
    out = store_split(p, precision, random(0), companion);
  } else if (precision == kSplit32) {
    out = store_split(p, precision, {}, companion);
  } else {
    if (precision == kMaster) companion = narrow(p, kF32);
    out = narrow(p, dtype);
  }
  return out;
}

}  // namespace fo
