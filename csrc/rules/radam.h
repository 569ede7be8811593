// RAdam: Liu et al. (arXiv 1908.03265), algorithm 2; adapt holds the rectification, plain is 1 before it applies.
#pragma once
#include "../scalar.h"

namespace fo {

struct Radam : Elementwise {
  FO_NAME("radam")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, adapt, plain, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    return exp_avg * c.debias1 * (div(c.adapt, sqrt(exp_avg_sq) + c.eps) + c.plain);
  }
};

}  // namespace fo

FO_RULE(Radam)
