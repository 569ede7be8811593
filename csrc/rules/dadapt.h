// D-Adaptation for Adam: Defazio and Mishchenko (arXiv 2301.07733), algorithm 5. step_size is d, a number of the whole model
// (fusedopt/measures.py), times the rate; it is in the first moment, so the row's learning rate is 1.
#pragma once
#include "../scalar.h"

namespace fo {

struct DAdaptAdam : Elementwise {
  FO_NAME("dadapt_adam")
  FO_STATES(exp_avg, exp_avg_sq, grad_sum)
  FO_SCALARS(beta1, weight1, beta2, weight2, beta3, weight3, eps, rate, d0, growth_rate, step_size)

  static FO_HD Pair terms(float g, float, const float&, const float& exp_avg_sq, const float& grad_sum, const Scalars& c) {
    const float scaled = c.step_size * g;
    return {div(scaled * grad_sum, sqrt(exp_avg_sq) + c.eps), abs(c.beta3 * grad_sum + c.weight3 * scaled)};
  }

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, float& grad_sum, const Scalars& c) {
    const float scaled = c.step_size * g;
    exp_avg = c.beta1 * exp_avg + c.weight1 * scaled;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    grad_sum = c.beta3 * grad_sum + c.weight3 * scaled;
    return div(exp_avg, sqrt(exp_avg_sq) + c.eps);
  }
};

}  // namespace fo

FO_RULE(DAdaptAdam)
