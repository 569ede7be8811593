// Adamax: Kingma and Ba (arXiv 1412.6980), algorithm 2; eps is added to |g|, as torch.optim does.
#pragma once
#include "../scalar.h"

namespace fo {

struct Adamax : Elementwise {
  FO_NAME("adamax")
  FO_STATES(exp_avg, exp_inf)
  FO_SCALARS(beta1, weight1, beta2, debias1, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_inf, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_inf = max(c.beta2 * exp_inf, abs(g) + c.eps);
    return div(exp_avg * c.debias1, exp_inf);
  }
};

}  // namespace fo

FO_RULE(Adamax)
