// Parts of Adam (arXiv 1412.6980, algorithm 1) as building blocks for projections: the moving average alone, and Adam over a
// numerator that was computed elsewhere, which read the same scalars, so that one row serves both; and Adam that leaves elements
// without a gradient alone.
#pragma once
#include "adam.h"

namespace fo {

struct Ema : Elementwise {
  FO_NAME("ema")
  FO_STATES(exp_avg)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps)

  static FO_HD float direction(float g, float, float& exp_avg, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    return exp_avg;
  }
};

struct AdamDenominator : Elementwise {
  FO_NAME("adam_denominator")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    return div(exp_avg * c.debias1, sqrt(exp_avg_sq) * c.debias2_sqrt + c.eps);
  }
};

struct AdamLazy : Elementwise {
  FO_NAME("adam_lazy")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps)

  static FO_HD float direction(float g, float p, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    float m = exp_avg, v = exp_avg_sq;
    const float u = Adam::direction(g, p, m, v, {c.beta1, c.weight1, c.beta2, c.weight2, c.debias1, c.debias2_sqrt, c.eps});
    exp_avg = g == 0.f ? exp_avg : m;
    exp_avg_sq = g == 0.f ? exp_avg_sq : v;
    return g == 0.f ? 0.f : u;
  }
};

}  // namespace fo

FO_RULE(Ema)
FO_RULE(AdamDenominator)
FO_RULE(AdamLazy)
