// Adaptive Braking: Venigalla et al. (arXiv 2007.01397). brake is the tensor's own number (fusedopt/measures.py), from <g, b> and |g|.
#pragma once
#include "../scalar.h"

namespace fo {

struct AdaptiveBraking : Elementwise {
  FO_NAME("adaptive_braking")
  FO_STATES(momentum_buffer)
  FO_SCALARS(momentum, rho, eps, brake)

  static FO_HD Pair terms(float g, float, const float& momentum_buffer, const Scalars&) { return {g * momentum_buffer, g * g}; }

  static FO_HD float direction(float g, float, float& momentum_buffer, const Scalars& c) {
    momentum_buffer = c.momentum * momentum_buffer + c.brake * g;
    return momentum_buffer;
  }
};

}  // namespace fo

FO_RULE(AdaptiveBraking)
