// Adam with critical momenta: Malviya et al. (arXiv 2307.09638), algorithm 1. debias1 = 1 / (1 - beta1^t), debias2 = 1 / sqrt(1 -
// beta2^t); weight1 is 0 at the first step. critical_mean is written between steps (fusedopt/transforms/critical.py).
#pragma once
#include "../scalar.h"

namespace fo {

struct AdamCM : Elementwise {
  FO_NAME("adam_cm")
  FO_STATES(exp_avg, exp_avg_sq, critical_mean)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, debias2, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, float& critical_mean, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    const float moved = exp_avg + critical_mean;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (moved * moved);
    return div(c.debias1 * moved, sqrt(exp_avg_sq) * c.debias2 + c.eps);
  }
};

}  // namespace fo

FO_RULE(AdamCM)
