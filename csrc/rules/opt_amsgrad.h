// OPT-AMSGrad: Wang et al., "An Optimistic Acceleration of AMSGrad for Nonconvex Optimization" (arXiv 1903.01435), algorithm 2, with
// the last gradient as the prediction of the next. u is the whole displacement of the parameter: the step size is 1.
#pragma once
#include "../scalar.h"

namespace fo {

struct OptAmsgrad : Elementwise {
  FO_NAME("opt_amsgrad")
  FO_STATES(exp_avg, exp_avg_sq, max_exp_avg_sq, anchor)
  FO_SCALARS(beta1, weight1, beta2, weight2, lr, eps)

  static FO_HD float direction(float g, float p, float& exp_avg, float& exp_avg_sq, float& max_exp_avg_sq, float& anchor,
                               const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    max_exp_avg_sq = max(exp_avg_sq, max_exp_avg_sq);
    float size = div(c.lr, sqrt(max_exp_avg_sq) + c.eps);
    anchor = anchor - size * exp_avg;
    return (p - anchor) + size * (c.beta1 * exp_avg + c.weight1 * g);
  }
};

}  // namespace fo

FO_RULE(OptAmsgrad)
