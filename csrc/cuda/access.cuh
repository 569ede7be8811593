// Octets: the 8 consecutive elements of one lane, loaded raw (whole block in flight before any arithmetic), widened, narrowed, stored.
#pragma once
#include "../philox.h"
#include "../precision.h"
#include "bytes.cuh"

namespace fo {

constexpr int kOctet = 8;

// Words that a narrow type leaves unused are zero: undefined on one path only, ptxas would keep them through the whole loop.
struct Octet { uint32_t word[kOctet]; };  // 8 fp32, 8 halves in words 0..3, 8 codes in words 0..1, or 16 codes of 4 bits in an even lane's

// One tensor seen from a chunk: the chunk's first element and log2 of the bytes of two elements (4-bit codes: 0).
struct Stream {
  char* base;
  int shift;
  FO_DEV char* at(uint32_t element) const { return base + (element / 2 << shift); }
};

FO_DEV Stream make_stream(int64_t address, int shift, int64_t first) { return {reinterpret_cast<char*>(address) + (first / 2 << shift), shift}; }
FO_DEV int dtype_shift(int dtype) { return dtype == kF32 ? 3 : 2; }

// 4-bit codes: the even lane of two moves the 8 bytes of both; the other half travels by shuffle, after all loads are on their way.
FO_DEV bool moves_codes(const Stream& s) { return s.shift == 1 || (threadIdx.x & 1) == 0; }
FO_DEV int live_bytes(const Stream& s, int live) { return s.shift == 1 ? live : threadIdx.x & 1 ? 0 : (live + 1) / 2; }
FO_DEV uint32_t take_half(const Octet& o) {
  const uint32_t other = __shfl_xor_sync(kAllLanes, o.word[1], 1);
  return threadIdx.x & 1 ? other : o.word[0];
}
FO_DEV Octet give_half(uint32_t word) {
  Octet o = {};
  o.word[0] = word, o.word[1] = __shfl_xor_sync(kAllLanes, word, 1);
  return o;
}

// Streaming hints (evict first): nothing a step touches is read again before the whole model has passed.
FO_DEV Octet load_octet(const Stream& s, uint32_t element) {
  Octet o = {};
  const char* from = s.at(element);
  if (s.shift == 3) {
    uint4 a = __ldcs(reinterpret_cast<const uint4*>(from)), b = __ldcs(reinterpret_cast<const uint4*>(from) + 1);
    o = {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
  } else if (s.shift == 2) {
    uint4 a = __ldcs(reinterpret_cast<const uint4*>(from));
    o.word[0] = a.x, o.word[1] = a.y, o.word[2] = a.z, o.word[3] = a.w;
  } else {
    if (moves_codes(s)) {
      uint2 a = __ldcs(reinterpret_cast<const uint2*>(from));
      o.word[0] = a.x, o.word[1] = a.y;
    }
  }
  return o;
}

FO_DEV void store_octet(const Stream& s, uint32_t element, const Octet& o) {
  char* to = s.at(element);
  const uint32_t* w = o.word;
  if (s.shift == 3) {
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(w[0], w[1], w[2], w[3]));
    __stcs(reinterpret_cast<uint4*>(to) + 1, make_uint4(w[4], w[5], w[6], w[7]));
  } else if (s.shift == 2) {
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(w[0], w[1], w[2], w[3]));
  } else if (moves_codes(s)) {
    __stcs(reinterpret_cast<uint2*>(to), make_uint2(w[0], w[1]));
  }
}

// Tails and rows that are not 16-byte aligned: element by element, `live` of the 8; the rest reads as 0.
FO_DEV Octet load_octet_masked(const Stream& s, uint32_t element, int live) {
  Octet o = {};
  const char* from = s.at(element);
  if (s.shift == 3) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i)
      if (i < live) o.word[i] = __ldcs(reinterpret_cast<const uint32_t*>(from) + i);
  } else if (s.shift == 2) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i)
      if (i < live) o.word[i / 2] |= uint32_t(__ldcs(reinterpret_cast<const uint16_t*>(from) + i)) << (16 * (i & 1));
  } else {
    const int bytes = live_bytes(s, live);
#pragma unroll
    for (int i = 0; i < kOctet; ++i)
      if (i < bytes) {
        int at = 8 * (i & 3);
        o.word[i / 4] = (o.word[i / 4] & ~(0xFFu << at)) | uint32_t(__ldcs(reinterpret_cast<const uint8_t*>(from) + i)) << at;
      }
  }
  return o;
}

FO_DEV void store_octet_masked(const Stream& s, uint32_t element, int live, const Octet& o) {
  char* to = s.at(element);
  if (s.shift == 3) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i)
      if (i < live) __stcs(reinterpret_cast<uint32_t*>(to) + i, o.word[i]);
  } else if (s.shift == 2) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i)
      if (i < live) __stcs(reinterpret_cast<uint16_t*>(to) + i, uint16_t(o.word[i / 2] >> (16 * (i & 1))));
  } else {
    const int bytes = live_bytes(s, live);
#pragma unroll
    for (int i = 0; i < kOctet; ++i)
      if (i < bytes) __stcs(reinterpret_cast<uint8_t*>(to) + i, uint8_t(o.word[i / 4] >> (8 * (i & 3))));
  }
}

// The hardware conversions round like precision.h (to nearest even); a NaN becomes the canonical one.
FO_DEV uint32_t pack_bf16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  return float_to_bf16(low) | uint32_t(float_to_bf16(high)) << 16;
#endif
}

FO_DEV uint32_t pack_f16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  return float_to_f16(low) | uint32_t(float_to_f16(high)) << 16;
#endif
}

FO_DEV float widen_f16(uint16_t h) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
#else
  return f16_to_float(h);
#endif
}

FO_DEV void widen(float (&v)[kOctet], const Octet& o, int dtype) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) v[i] = from_bits(o.word[i]);
  if (dtype == kBF16) {
#pragma unroll
    for (int i = kOctet - 1; i >= 0; --i) v[i] = from_bits(i & 1 ? o.word[i / 2] & 0xFFFF0000u : o.word[i / 2] << 16);
  } else if (dtype == kF16) {
#pragma unroll
    for (int i = kOctet - 1; i >= 0; --i) v[i] = widen_f16(uint16_t(o.word[i / 2] >> (16 * (i & 1))));
  }
}

FO_DEV Octet narrow(const float (&v)[kOctet], int dtype) {
  Octet o = {};
  if (dtype == kF32) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) o.word[i] = bits(v[i]);
  } else if (dtype == kBF16) {
#pragma unroll
    for (int i = 0; i < kOctet; i += 2) o.word[i / 2] = pack_bf16(v[i], v[i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; i += 2) o.word[i / 2] = pack_f16(v[i], v[i + 1]);
  }
  return o;
}

FO_DEV bool any_nan(const float (&v)[kOctet]) {
#if defined(__CUDA_ARCH__)
  uint32_t any;  // spelled out, since a comparison takes two values, and the compiler makes one for each
  asm("{ .reg .pred p; setp.nan.f32 p, %1, %2; setp.nan.or.f32 p, %3, %4, p; setp.nan.or.f32 p, %5, %6, p;"
      " setp.nan.or.f32 p, %7, %8, p; selp.u32 %0, 1, 0, p; }"
      : "=r"(any) : "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "f"(v[4]), "f"(v[5]), "f"(v[6]), "f"(v[7]));
  return any;
#else
  bool any = false;
  for (float x : v) any |= x != x;
  return any;
#endif
}

// float_to_bf16_stochastic of precision.h for values that come from arithmetic, so that a NaN is a quiet one. Infinity, whose low half
// is 0, cannot carry; what would make a NaN carry is cleared, in the rare octet that holds one.
FO_DEV Octet narrow_bf16_stochastic(const float (&v)[kOctet], Random8 r) {
  if (any_nan(v)) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i)
      if (v[i] != v[i]) r.word[i / 2] &= i & 1 ? 0xFFFFu : 0xFFFF0000u;
  }
  Octet o = {};
#pragma unroll
  for (int i = 0; i < kOctet; i += 2) {
    const uint32_t random = r.word[i / 2];
    o.word[i / 2] = select_bytes(bits(v[i]) + (random & 0xFFFFu), bits(v[i + 1]) + (random >> 16), 0x7632);
  }
  return o;
}

FO_DEV Octet narrow_stochastic(const float (&v)[kOctet], int dtype, const Random8& r) {
  Octet o = {};
  if (dtype == kBF16) {
    o = narrow_bf16_stochastic(v, r);
  } else {
    // One pair at a time, the octet rotating: unrolled, the long fp16 rounding would set the registers of the whole kernel.
    Random8 left = r;
    float x[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = v[i];
#pragma unroll 1
    for (int pair = 0; pair < kOctet / 2; ++pair) {
      const uint32_t random = left.word[0];
      const uint32_t done = float_to_f16_stochastic(x[0], random & 0xFFFFu) | uint32_t(float_to_f16_stochastic(x[1], random >> 16)) << 16;
#pragma unroll
      for (int i = 0; i + 2 < kOctet; ++i) x[i] = x[i + 2];
#pragma unroll
      for (int i = 0; i < 3; ++i) left.word[i] = left.word[i + 1], o.word[i] = o.word[i + 1];
      o.word[3] = done;
    }
  }
  return o;
}

}  // namespace fo
