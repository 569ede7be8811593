// NAdam: Dozat (ICLR 2016 workshop), algorithm 2, as torch.optim; look_grad and look_avg hold the schedule of mu and its product.
#pragma once
#include "../scalar.h"

namespace fo {

struct Nadam : Elementwise {
  FO_NAME("nadam")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias2_sqrt, look_grad, look_avg, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    return div(c.look_grad * g + c.look_avg * exp_avg, sqrt(exp_avg_sq) * c.debias2_sqrt + c.eps);
  }
};

}  // namespace fo

FO_RULE(Nadam)
