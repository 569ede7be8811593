// AdaBound and AMSBound: Luo et al. (arXiv 1902.09843), algorithms 2 and 3; rate, lower and upper are shares of the learning rate.
#pragma once
#include "../scalar.h"

namespace fo {

struct Adabound : Elementwise {
  FO_NAME("adabound")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, rate, lower, upper, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    return min(max(div(c.rate, sqrt(exp_avg_sq) + c.eps), c.lower), c.upper) * exp_avg;
  }
};

struct Amsbound : Elementwise {
  FO_NAME("amsbound")
  FO_STATES(exp_avg, exp_avg_sq, max_exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, rate, lower, upper, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, float& max_exp_avg_sq, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    max_exp_avg_sq = max(exp_avg_sq, max_exp_avg_sq);
    return min(max(div(c.rate, sqrt(max_exp_avg_sq) + c.eps), c.lower), c.upper) * exp_avg;
  }
};

}  // namespace fo

FO_RULE(Adabound)
FO_RULE(Amsbound)
