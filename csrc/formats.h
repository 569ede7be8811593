// State formats: one code for each element and one fp32 scale for each block. Every header has a pair of scalar functions,
// <format>_decode<Signed>(code, scale) and <format>_encode<Signed>(x, inverse of the scale), which define the codes of the drivers.
//
// Signed serves first moments, unsigned second moments, which never decode to zero unless they are zero: m / sqrt(v) stays
// bounded. A NaN or an infinity takes the code of the block's largest value and leaves the scale alone.
#pragma once
#include "formats/fp8.h"
#include "formats/int4.h"
#include "formats/int8.h"
#include "formats/int8c.h"

namespace fo {

FO_HD bool is_blockwise(int32_t format) {
  const int32_t id = format & kFormatMask;
  return id >= kFormatInt8 && id <= kFormatInt4;
}
FO_HD int block_size(int32_t format) { return (format & kFormatMask) == kFormatInt4 ? kHalfBlock : kBlock; }
FO_HD int code_bits(int32_t format) { return (format & kFormatMask) == kFormatInt4 ? 4 : 8; }

}  // namespace fo
