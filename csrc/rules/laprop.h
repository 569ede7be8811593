// LaProp: Ziyin, Wang and Ueda (arXiv 2002.04839), algorithm 1; centered and amsgrad as in the authors' code.
#pragma once
#include "../scalar.h"

namespace fo {

struct Laprop : Elementwise {
  FO_NAME("laprop")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps, centre)

  static FO_HD float second(float g, float exp_avg_sq, const Scalars& c) { return c.beta2 * exp_avg_sq + c.weight2 * (g * g); }

  static FO_HD float variance(float exp_avg_sq, float grad_avg, const Scalars& c) {
    return max(exp_avg_sq - c.centre * (grad_avg * grad_avg), 0.f);
  }

  // What the momentum has become; u without the bias correction.
  static FO_HD float blend(float g, float exp_avg, float variance, const Scalars& c) {
    return c.beta1 * exp_avg + c.weight1 * div(g, sqrt(variance) * c.debias2_sqrt + c.eps);
  }

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    exp_avg_sq = second(g, exp_avg_sq, c);
    exp_avg = blend(g, exp_avg, exp_avg_sq, c);
    return exp_avg * c.debias1;
  }
};

struct LapropAmsgrad : Elementwise {
  FO_NAME("laprop_amsgrad")
  FO_STATES(exp_avg, exp_avg_sq, max_exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps, centre)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, float& max_exp_avg_sq, const Scalars& k) {
    const Laprop::Scalars c{k.beta1, k.weight1, k.beta2, k.weight2, k.debias1, k.debias2_sqrt, k.eps, k.centre};
    exp_avg_sq = Laprop::second(g, exp_avg_sq, c);
    max_exp_avg_sq = max(exp_avg_sq, max_exp_avg_sq);
    exp_avg = Laprop::blend(g, exp_avg, max_exp_avg_sq, c);
    return exp_avg * c.debias1;
  }
};

struct LapropCentered : Elementwise {
  FO_NAME("laprop_centered")
  FO_STATES(exp_avg, exp_avg_sq, grad_avg)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps, centre)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, float& grad_avg, const Scalars& k) {
    const Laprop::Scalars c{k.beta1, k.weight1, k.beta2, k.weight2, k.debias1, k.debias2_sqrt, k.eps, k.centre};
    exp_avg_sq = Laprop::second(g, exp_avg_sq, c);
    grad_avg = c.beta2 * grad_avg + c.weight2 * g;
    exp_avg = Laprop::blend(g, exp_avg, Laprop::variance(exp_avg_sq, grad_avg, c), c);
    return exp_avg * c.debias1;
  }
};

}  // namespace fo

FO_RULE(Laprop)
FO_RULE(LapropAmsgrad)
FO_RULE(LapropCentered)
