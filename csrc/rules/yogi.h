// Yogi: Zaheer et al. (NeurIPS 2018), algorithm 2, debiased.
#pragma once
#include "../scalar.h"

namespace fo {

struct Yogi : Elementwise {
  FO_NAME("yogi")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, weight2, debias1, debias2_sqrt, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    float square = g * g;
    exp_avg_sq -= c.weight2 * square * sign(exp_avg_sq - square);
    return div(exp_avg * c.debias1, sqrt(exp_avg_sq) * c.debias2_sqrt + c.eps);
  }
};

}  // namespace fo

FO_RULE(Yogi)
