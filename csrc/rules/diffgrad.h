// diffGrad: Dubey et al. (arXiv 1909.11015), algorithm 1.
#pragma once
#include "../scalar.h"

namespace fo {

struct Diffgrad : Elementwise {
  FO_NAME("diffgrad")
  FO_STATES(exp_avg, exp_avg_sq, previous_grad)
  FO_SCALARS(beta1, weight1, beta2, weight2, rate, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, float& previous_grad, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    float friction = div(1.f, 1.f + exp_of_negative(-abs(previous_grad - g)));
    previous_grad = g;
    return div(c.rate * friction * exp_avg, sqrt(exp_avg_sq) + c.eps);
  }
};

}  // namespace fo

FO_RULE(Diffgrad)
