// D-Adaptation for AdaGrad: Defazio and Mishchenko (arXiv 2301.07733), algorithm 3. step_size is d, a number of the whole model
// (fusedopt/measures.py), times the rate. u is the whole displacement of p, so the row's learning rate is 1.
#pragma once
#include "../scalar.h"

namespace fo {

struct DAdaptAdagrad : Elementwise {
  FO_NAME("dadapt_adagrad")
  FO_STATES(sum, step_sum, spent, initial_param)
  FO_SCALARS(weight, rate, eps, d0, growth_rate, step_size)

  static FO_HD Pair terms(float g, float, const float& sum, const float& step_sum, const float& spent, const float&, const Scalars& c) {
    const float scaled = c.step_size * g, total = step_sum + scaled;
    return {div(total * total - scaled * scaled, sqrt(sum + g * g) + c.eps) - spent, abs(total)};
  }

  static FO_HD float direction(float g, float p, float& sum, float& step_sum, float& spent, float& initial_param, const Scalars& c) {
    const float scaled = c.step_size * g;
    sum += g * g;
    step_sum += scaled;
    const float root = sqrt(sum) + c.eps;
    spent += div(scaled * scaled, root);
    return c.weight * ((p - initial_param) + div(step_sum, root));
  }
};

}  // namespace fo

FO_RULE(DAdaptAdagrad)
