// Ranger21's inner step: positive-negative momentum (Xie et al., arXiv 2103.17182) over a softplus of AMSGrad's root
// (arXiv 2106.13731). Which of the two averages has its turn is in the numbers.
#pragma once
#include "../scalar.h"

namespace fo {

struct PnmAdam : Elementwise {
  FO_NAME("pnm_adam")
  FO_STATES(exp_avg, exp_avg_even, exp_avg_sq, max_exp_avg_sq)
  FO_SCALARS(keep_odd, enter_odd, weigh_odd, keep_even, enter_even, weigh_even, beta2, weight2, debias2_sqrt, eps, keep_max, softplus,
             over_softplus)

  // log(1 + y) for 0 <= y <= 1: 2 artanh(z), z = y / (2 + y) <= 1/3, whose series is cut below 2e-9. A call keeps loops from vectorising.
  static FO_HD float log_of_one_plus(float y) {
    const float z = div(y, 2.f + y), s = z * z;
    float sum = 1.f / 15.f;
    sum = sum * s + 1.f / 13.f;
    sum = sum * s + 1.f / 11.f;
    sum = sum * s + 1.f / 9.f;
    sum = sum * s + 1.f / 7.f;
    sum = sum * s + 1.f / 5.f;
    sum = sum * s + 1.f / 3.f;
    return 2.f * z * (sum * s + 1.f);
  }

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_even, float& exp_avg_sq, float& max_exp_avg_sq,
                               const Scalars& c) {
    exp_avg = c.keep_odd * exp_avg + c.enter_odd * g;
    exp_avg_even = c.keep_even * exp_avg_even + c.enter_even * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    max_exp_avg_sq = max(exp_avg_sq, c.keep_max * max_exp_avg_sq);
    const float root = sqrt(max_exp_avg_sq) * c.debias2_sqrt + c.eps;
    const float y = exp_of_negative(-c.softplus * root);
    return div(c.weigh_odd * exp_avg + c.weigh_even * exp_avg_even, root + c.over_softplus * log_of_one_plus(y));
  }
};

}  // namespace fo

FO_RULE(PnmAdam)
