// AdaMuon (arXiv 2507.11005): the momentum, or its sign, that becomes orthogonal, and the second moment of orthogonal factors. What
// lies between them is a matrix's (fusedopt/projections/orthogonal.py).
#pragma once
#include "../scalar.h"

namespace fo {

struct AdaMuonMomentum : Elementwise {
  FO_NAME("adamuon_momentum")
  FO_STATES(momentum_buffer)
  FO_SCALARS(momentum, weight, look_grad, look_buffer, sign_weight, value_weight)

  static FO_HD float direction(float g, float, float& momentum_buffer, const Scalars& c) {
    momentum_buffer = c.momentum * momentum_buffer + c.weight * g;
    const float u = c.look_grad * g + c.look_buffer * momentum_buffer;
    return c.sign_weight * sign(u) + c.value_weight * u;
  }
};

struct AdaMuonSecond : Elementwise {
  FO_NAME("adamuon_second")
  FO_STATES(exp_avg_sq)
  FO_SCALARS(beta2, weight2, debias_sqrt, eps)

  static FO_HD float direction(float g, float, float& exp_avg_sq, const Scalars& c) {
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    return div(g, sqrt(exp_avg_sq) * c.debias_sqrt + c.eps);
  }
};

}  // namespace fo

FO_RULE(AdaMuonMomentum)
FO_RULE(AdaMuonSecond)
