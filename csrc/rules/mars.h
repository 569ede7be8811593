// MARS-AdamW and MARS-Lion: Yuan et al. (arXiv 2411.10438), algorithms 2 and 3. shrink = 1 / max(1, |corrected gradient|) is the
// tensor's own number (fusedopt/measures.py).
#pragma once
#include "adam.h"

namespace fo {

FO_HD float mars_correct(float g, float previous, float change) { return g + change * (g - previous); }

struct MarsAdamW : Elementwise {
  FO_NAME("mars_adamw")
  FO_STATES(exp_avg, exp_avg_sq, previous_grad)
  FO_SCALARS(beta1, weight1, change, shrink, beta2, weight2, debias1, debias2_sqrt, eps)

  static FO_HD Pair terms(float g, float, const float&, const float&, const float& previous_grad, const Scalars& c) {
    const float x = mars_correct(g, previous_grad, c.change);
    return {x * x, 0.f};
  }

  static FO_HD float direction(float g, float p, float& exp_avg, float& exp_avg_sq, float& previous_grad, const Scalars& c) {
    const float x = mars_correct(g, previous_grad, c.change) * c.shrink;
    previous_grad = g;
    return Adam::direction(x, p, exp_avg, exp_avg_sq, {c.beta1, c.weight1, c.beta2, c.weight2, c.debias1, c.debias2_sqrt, c.eps});
  }
};

struct MarsLion : Elementwise {
  FO_NAME("mars_lion")
  FO_STATES(exp_avg, previous_grad)
  FO_SCALARS(beta1, weight1, change, shrink)

  static FO_HD Pair terms(float g, float, const float&, const float& previous_grad, const Scalars& c) {
    const float x = mars_correct(g, previous_grad, c.change);
    return {x * x, 0.f};
  }

  static FO_HD float direction(float g, float, float& exp_avg, float& previous_grad, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * (mars_correct(g, previous_grad, c.change) * c.shrink);
    previous_grad = g;
    return sign(exp_avg);
  }
};

}  // namespace fo

FO_RULE(MarsAdamW)
FO_RULE(MarsLion)
