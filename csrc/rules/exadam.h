// EXAdam: Adly (arXiv 2412.20302), algorithm 1; power1 and power2 are beta1^t and beta2^t, gain the growing step.
#pragma once
#include "../scalar.h"

namespace fo {

struct Exadam : Elementwise {
  FO_NAME("exadam")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, debias2, power1, power2, gain, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    float square = exp_avg * exp_avg;
    float d1 = 1.f + div(exp_avg_sq, exp_avg_sq + c.eps) * c.power2;
    float d2 = 1.f + div(square, square + c.eps) * c.power1;
    return div((exp_avg + g) * (c.debias1 * c.gain) * d1, sqrt(exp_avg_sq * c.debias2 * d2) + c.eps);
  }
};

}  // namespace fo

FO_RULE(Exadam)
