// AdaBelief: Zhuang et al. (arXiv 2010.07468), algorithm 2; adapt, root and plain say whether and how it is rectified.
#pragma once
#include "../scalar.h"

namespace fo {

struct Adabelief : Elementwise {
  FO_NAME("adabelief")
  FO_STATES(exp_avg, exp_avg_var)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, root, adapt, plain, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_var, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    float surprise = g - exp_avg;
    exp_avg_var = c.beta2 * exp_avg_var + c.weight2 * (surprise * surprise) + c.eps;
    return exp_avg * c.debias1 * (div(c.adapt, sqrt(exp_avg_var) * c.root + c.eps) + c.plain);
  }
};

struct AdabeliefAmsgrad : Elementwise {
  FO_NAME("adabelief_amsgrad")
  FO_STATES(exp_avg, exp_avg_var, max_exp_avg_var)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, root, adapt, plain, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_var, float& max_exp_avg_var, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    float surprise = g - exp_avg;
    exp_avg_var = c.beta2 * exp_avg_var + c.weight2 * (surprise * surprise) + c.eps;
    max_exp_avg_var = max(max_exp_avg_var, exp_avg_var);
    return exp_avg * c.debias1 * (div(c.adapt, sqrt(max_exp_avg_var) * c.root + c.eps) + c.plain);
  }
};

}  // namespace fo

FO_RULE(Adabelief)
FO_RULE(AdabeliefAmsgrad)
