// The scale of a block: its largest finite magnitude, fp32. What is smaller than the smallest normal number counts as zero, what
// is larger than 2^126 as 2^126: the inverse of a larger scale would be subnormal.
#pragma once
#include "../scalar.h"

namespace fo {

constexpr uint32_t kSmallest = 0x00800000u, kLargest = 0x7E800000u, kInfinite = 0x7F800000u;

// Drivers reduce magnitudes first, in integer order, where infinity and NaN are the largest. Only a block that holds one
// (largest > kLargest) is reduced again with this, and saturated.
FO_HD uint32_t finite_magnitude(float x) { return magnitude(x) < kInfinite ? magnitude(x) : 0u; }
FO_HD uint32_t saturated(uint32_t largest) { return largest < kLargest ? largest : kLargest; }
FO_HD float block_scale(uint32_t largest) { return largest < kSmallest ? 0.f : from_bits(largest); }
FO_HD float inverse_scale(float scale) { return scale > 0.f ? 1.f / scale : 0.f; }

// |x| / scale in [0, 1]; NaN and infinity give 1: they take the code of the block's largest value.
FO_HD float share_of_scale(float x, float inverse) {
  float y = from_bits(magnitude(x)) * inverse;
  return y < 1.f ? y : 1.f;
}

FO_HD bool present(float x, float inverse) { return magnitude(x) >= kSmallest && inverse > 0.f; }  // a second moment that is not zero

}  // namespace fo
