// int8c: companded codes without a table, after FlashOptim (arXiv 2602.23349). With y = |x| / scale:
//   signed    q = round(127 * 2 y / (1 + y)) with x's sign in two's complement, y = q / (254 - q)
//   unsigned  q = round(255 sqrt(y)), y = (q / 255)^2
#pragma once
#include "scale.h"

namespace fo {

template <bool Signed>
FO_HD float int8c_decode(uint8_t code, float scale) {
  if (Signed) {
    float q = float(int8_t(code));
    return q / (254.f - (q < 0.f ? -q : q)) * scale;
  }
  float w = float(code) * (1.f / 255.f);
  return w * w * scale;
}

template <bool Signed>
FO_HD uint8_t int8c_encode(float x, float inverse) {
  const float y = share_of_scale(x, inverse);
  if (Signed) {
    int q = int(254.f * y / (1.f + y) + 0.5f);
    return uint8_t(bits(x) >> 31 ? -q : q);
  }
  int q = int(255.f * sqrt(y) + 0.5f);
  return uint8_t(!present(x, inverse) ? 0 : q < 1 ? 1 : q);
}

}  // namespace fo
