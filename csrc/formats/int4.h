// int4: two codes a byte, the even element in the high half; 128 elements share a scale. signed: the 4-bit dynamic map
// (0, +-0.0055, +-0.0325, +-0.0775, +-0.2125, +-0.4375, +-0.6625, +-0.8875, 1 as code - 7). unsigned: (code + 1) / 16,
// Li et al., "Memory Efficient Optimizers with 4-bit States" (arXiv 2309.01507): no zero but in a block of zeros, whose scale is 0.
#pragma once
#include "scale.h"

namespace fo {

struct Int4Map {
  float value[9] = {0.f, 0.0055f, 0.0325f, 0.0775f, 0.2125f, 0.4375f, 0.6625f, 0.8875f, 1.f};             // by |code - 7|
  float boundary[8] = {0.00275f, 0.019f, 0.055f, 0.145f, 0.325f, 0.55f, 0.775f, 0.94375f};  // where |code - 7| goes up
};

template <bool Signed>
FO_HD float int4_decode(uint8_t code, float scale) {
  if (Signed) {
    constexpr Int4Map map{};
    int k = int(code) - 7;
    float value = map.value[k < 0 ? -k : k] * scale;
    return k < 0 ? -value : value;
  }
  return (float(code) + 1.f) * 0.0625f * scale;
}

template <bool Signed>
FO_HD uint8_t int4_encode(float x, float inverse) {
  const float y = share_of_scale(x, inverse);
  if (Signed) {
    constexpr Int4Map map{};
    int k = 0;
    for (int i = 0; i < 8; ++i) k += y >= map.boundary[i];
    if (!(inverse > 0.f)) k = 0;
    return uint8_t(bits(x) >> 31 ? 7 - (k > 7 ? 7 : k) : 7 + k);
  }
  int code = int(16.f * y + 0.5f) - 1;
  return uint8_t(code < 0 || !(inverse > 0.f) ? 0 : code);
}

}  // namespace fo
