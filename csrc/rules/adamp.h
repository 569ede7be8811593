// AdamP with Nesterov's look-ahead: Heo et al. (arXiv 2006.08217), algorithm 2 without its projection (fusedopt/transforms/tangent.py);
// without look-ahead it is Adam's direction.
#pragma once
#include "../scalar.h"

namespace fo {

struct AdampNesterov : Elementwise {
  FO_NAME("adamp_nesterov")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    const float entering = c.weight1 * g;
    exp_avg = c.beta1 * exp_avg + entering;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    return div((c.beta1 * exp_avg + entering) * c.debias1, sqrt(exp_avg_sq) * c.debias2_sqrt + c.eps);
  }
};

}  // namespace fo

FO_RULE(AdampNesterov)
