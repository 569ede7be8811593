// AdEMAMix: Pagliardini, Ablin and Grangier (arXiv 2409.03137), algorithm 1; beta3 and alpha are those of the step.
#pragma once
#include "../scalar.h"

namespace fo {

struct Ademamix : Elementwise {
  FO_NAME("ademamix")
  FO_STATES(exp_avg, exp_avg_slow, exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, beta3, weight3, debias1, debias2_sqrt, alpha, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_slow, float& exp_avg_sq, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_avg_slow = c.beta3 * exp_avg_slow + c.weight3 * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    return div(exp_avg * c.debias1 + c.alpha * exp_avg_slow, sqrt(exp_avg_sq) * c.debias2_sqrt + c.eps);
  }
};

}  // namespace fo

FO_RULE(Ademamix)
