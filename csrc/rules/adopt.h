// ADOPT: Taniguchi et al. (arXiv 2411.02853), algorithm 2, with the clipping of the authors' code; the scalars of the first step
// leave the momentum as it is and set exp_avg_sq.
#pragma once
#include "../scalar.h"

namespace fo {

struct Adopt : Elementwise {
  FO_NAME("adopt")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, limit, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    float q = div(g, max(c.eps, sqrt(exp_avg_sq)));
    exp_avg = c.beta1 * exp_avg + c.weight1 * min(c.limit, max(-c.limit, q));
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    return exp_avg;
  }
};

}  // namespace fo

FO_RULE(Adopt)
