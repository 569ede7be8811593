// Grams: Cao et al. (arXiv 2412.17107), algorithm 1; debias is sqrt(1 - beta2^t) / (1 - beta1^t).
#pragma once
#include "../scalar.h"

namespace fo {

struct Grams : Elementwise {
  FO_NAME("grams")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    return div(sign(g) * abs(exp_avg) * c.debias, sqrt(exp_avg_sq) + c.eps);
  }
};

}  // namespace fo

FO_RULE(Grams)
