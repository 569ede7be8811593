// D-Adaptation for SGD: Defazio and Mishchenko (arXiv 2301.07733), algorithm 4. scale is d over the norm of the first gradient, both
// of the whole model (fusedopt/measures.py). u is the whole displacement of p, so the row's learning rate is 1.
#pragma once
#include "../scalar.h"

namespace fo {

struct DAdaptSgd : Elementwise {
  FO_NAME("dadapt_sgd")
  FO_STATES(step_sum, initial_param)
  FO_SCALARS(momentum, weight, rate, d0, growth_rate, scale)

  static FO_HD Pair terms(float g, float, const float& step_sum, const float&, const Scalars& c) {
    const float scaled = c.rate * c.scale * g;
    const float sum = step_sum + scaled;
    return {scaled * step_sum, sum * sum};
  }

  static FO_HD float direction(float g, float p, float& step_sum, float& initial_param, const Scalars& c) {
    step_sum += c.rate * c.scale * g;
    return c.weight * ((p - initial_param) + step_sum);
  }
};

}  // namespace fo

FO_RULE(DAdaptSgd)
