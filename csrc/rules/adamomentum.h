// AdaMomentum: Wang et al. (arXiv 2106.11514), algorithm 1; debias is sqrt(1 - beta2^t) / (1 - beta1^t).
#pragma once
#include "../scalar.h"

namespace fo {

struct Adamomentum : Elementwise {
  FO_NAME("adamomentum")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (exp_avg * exp_avg) + c.eps;
    return div(exp_avg * c.debias, sqrt(exp_avg_sq));
  }
};

}  // namespace fo

FO_RULE(Adamomentum)
