// Prodigy: Mishchenko and Defazio (arXiv 2306.06101), algorithm 4. d, d_next and the weights are numbers of the whole model
// (fusedopt/measures.py); the learning rate and the decay of the row carry their factor d already.
#pragma once
#include "../scalar.h"

namespace fo {

struct Prodigy : Elementwise {
  FO_NAME("prodigy")
  FO_STATES(exp_avg, exp_avg_sq, grad_sum, initial_param)
  FO_SCALARS(beta1, weight1, beta2, weight2, beta3, eps, debias, rate, safeguard, d0, d_coef, growth_rate, d, d_next, sum_weight,
             dot_weight)

  static FO_HD Pair terms(float g, float p, const float&, const float&, const float& grad_sum, const float& initial_param,
                          const Scalars& c) {
    return {c.dot_weight * g * (initial_param - p), abs(c.beta3 * grad_sum + c.sum_weight * g)};
  }

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, float& grad_sum, float&, const Scalars& c) {
    const float scaled = c.d * g;
    exp_avg = c.beta1 * exp_avg + c.weight1 * scaled;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (scaled * scaled);
    grad_sum = c.beta3 * grad_sum + c.sum_weight * g;
    return div(exp_avg, sqrt(exp_avg_sq) + c.d_next * c.eps);
  }
};

}  // namespace fo

FO_RULE(Prodigy)
