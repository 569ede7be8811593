// AdaMod: Ding et al. (arXiv 1910.12249), algorithm 1; rate holds the learning rate, u is multiplied by 1.
#pragma once
#include "../scalar.h"

namespace fo {

struct Adamod : Elementwise {
  FO_NAME("adamod")
  FO_STATES(exp_avg, exp_avg_sq, exp_avg_lr)
  FO_SCALARS(beta1, weight1, beta2, weight2, beta3, weight3, rate, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, float& exp_avg_lr, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    float size = div(c.rate, sqrt(exp_avg_sq) + c.eps);
    exp_avg_lr = c.beta3 * exp_avg_lr + c.weight3 * size;
    return min(size, exp_avg_lr) * exp_avg;
  }
};

}  // namespace fo

FO_RULE(Adamod)
