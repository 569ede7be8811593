// FRUGAL's stateless rule (arXiv 2411.07837, algorithm 1): signSGD or SGD, as the weight of each says.
#pragma once
#include "../scalar.h"

namespace fo {

struct Stateless : Elementwise {
  FO_NAME("stateless")
  FO_STATES()
  FO_SCALARS(sign_weight, value_weight)

  static FO_HD float direction(float g, float, const Scalars& c) {
    const float sign = g > 0.f ? 1.f : g < 0.f ? -1.f : g;  // of a zero 0, of a NaN NaN
    return c.sign_weight * sign + c.value_weight * g;
  }
};

}  // namespace fo

FO_RULE(Stateless)
