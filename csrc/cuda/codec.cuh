// Decoding and encoding a lane's octet of a state in any format. Formats are warp-uniform: their branches cost issue slots only.
#pragma once
#include "arithmetic.cuh"
#include "int8.cuh"

namespace fo {

FO_DEV int format_dtype(int format) { return (format & kFormatMask) == kFormatF32 ? kF32 : kBF16; }  // of a format without codes

FO_DEV int format_shift(int format) {
  const int id = format & kFormatMask;
  return id == kFormatInt4 ? 0 : is_blockwise(id) ? 1 : dtype_shift(format_dtype(id));
}

FO_DEV int block_shift(int format) { return (format & kFormatMask) == kFormatInt4 ? 7 : 8; }
static_assert(kHalfBlock == 1 << 7 && kBlock == 1 << 8, "block_shift");

template <bool Signed>
FO_DEV void decode_codes(float (&v)[kOctet], const Octet& o, int id, float scale, const CodeView& tables) {
  if (id == kFormatInt8) int8_decode8<Signed>(v, o, scale, tables);
  else if (id == kFormatInt8c) int8c_decode8<Signed>(v, o, scale, tables);
  else if (id == kFormatFp8) fp8_decode8<Signed>(v, o, scale);
  else int4_decode8<Signed>(v, take_half(o), scale, tables);
}

// The whole warp. scale: of the lane's block.
FO_DEV void decode(float (&v)[kOctet], const Octet& o, int format, float scale, const CodeView& tables) {
  const int id = format & kFormatMask;
  if (!is_blockwise(id)) widen(v, o, format_dtype(id));
  else if (format & kFormatSigned) decode_codes<true>(v, o, id, scale, tables);
  else decode_codes<false>(v, o, id, scale, tables);
}

// The largest of a block's magnitudes, as bits, and of all that the warp holds: one block, or two with halves.
struct Largest { uint32_t block, warp; };

FO_DEV Largest reduce_largest(uint32_t mine, bool halves) {
  if (!halves) {
    const uint32_t all = __reduce_max_sync(kAllLanes, mine);
    return {all, all};
  }
  const bool upper = threadIdx.x & 16;
  const uint32_t first = __reduce_max_sync(kAllLanes, upper ? 0u : mine), second = __reduce_max_sync(kAllLanes, upper ? mine : 0u);
  return {upper ? second : first, first > second ? first : second};
}

// What needs a second look: NaN and infinity, and scales by which a second moment that is not zero may underflow.
constexpr uint32_t kExtreme = 0x47000000u;  // 2^15: 2^-126 / 2^15 is the subnormal with the bits 0x100

// The blocks' finite maxima, saturated. In place of what is larger, NaN or infinity, the maximum with its sign; for second moments
// what has the lowest code that is not zero in place of what is too small.
FO_DEV Largest replace_extremes(float (&v)[kOctet], bool halves, bool is_signed) {
  uint32_t mine = 0;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) mine = finite_magnitude(v[i]) > mine ? finite_magnitude(v[i]) : mine;
  Largest largest = reduce_largest(mine, halves);
  largest.block = saturated(largest.block);
  const float least = is_signed ? 0.f : from_bits(largest.block) * 9.094947e-13f;  // 2^-40
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (magnitude(v[i]) > largest.block) v[i] = from_bits(largest.block | (bits(v[i]) & 0x80000000u));
    else if (is_present(v[i]) && fabsf(v[i]) < least) v[i] = least;
  }
  return largest;
}

template <bool Signed>
FO_DEV Octet encode_codes(const float (&v)[kOctet], int id, float inverse, const CodeView& tables) {
  if (id == kFormatInt8) return int8_encode8<Signed>(v, inverse, tables);
  if (id == kFormatInt8c) return int8c_encode8<Signed>(v, inverse);
  if (id == kFormatFp8) return fp8_encode8<Signed>(v, inverse);
  return give_half(int4_encode8<Signed>(v, inverse, tables));
}

// The whole warp: a block takes its scale from its lanes. v may change.
FO_DEV Octet encode(float (&v)[kOctet], int format, float& scale, const CodeView& tables) {
  const int id = format & kFormatMask;
  const bool halves = id == kFormatInt4;
  const bool is_signed = format & kFormatSigned;
  uint32_t mine = bits(v[0]);
  if (is_signed) {
    float most = fabsf(v[0]);
#pragma unroll
    for (int i = 1; i < kOctet; ++i) most = max_magnitude(most, v[i]);
    mine = bits(most);
  } else {  // second moments have no sign; where one has, the block is looked at again
#pragma unroll
    for (int i = 1; i + 1 < kOctet; i += 2) mine = max_of_three(mine, bits(v[i]), bits(v[i + 1]));
    mine = max_of_three(mine, bits(v[7]), 0u);
  }
  Largest largest = reduce_largest(mine, halves);
  if (largest.warp >= kExtreme) largest = replace_extremes(v, halves, is_signed);
  scale = block_scale(largest.block);
  const float inverse = largest.block < kSmallest ? 0.f : reciprocal_of_normal(scale);
  return is_signed ? encode_codes<true>(v, id, inverse, tables) : encode_codes<false>(v, id, inverse, tables);
}

// What lies outside the row must not reach a block's scale.
FO_DEV void clear_tail(float (&v)[kOctet], int live) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) v[i] = i < live ? v[i] : 0.f;
}

FO_DEV bool owns_scale(int format, int live) { return (threadIdx.x & ((format & kFormatMask) == kFormatInt4 ? 15 : 31)) == 0 && live > 0; }

}  // namespace fo
