// MADGRAD: Defazio and Jelassi (arXiv 2101.11075), algorithm 1. u is the whole displacement of the parameter: the step size is 1.
#pragma once
#include "../scalar.h"

namespace fo {

struct Madgrad : Elementwise {
  FO_NAME("madgrad")
  FO_STATES(grad_sum_sq, s)
  FO_SCALARS(weight, pull, eps)

  // The distance to the point that the sums stand for; none where no gradient has been.
  static FO_HD float distance(float sum, float square_sum, float eps) {
    float root = cube_root(square_sum) + eps;
    return root > 0.f ? div(sum, root) : 0.f * sum;
  }

  static FO_HD float direction(float g, float, float& grad_sum_sq, float& s, const Scalars& c) {
    float before = distance(s, grad_sum_sq, c.eps);
    grad_sum_sq = grad_sum_sq + c.weight * (g * g);
    s = s + c.weight * g;
    return distance(s, grad_sum_sq, c.eps) - before;
  }
};

struct MadgradMomentum : Elementwise {
  FO_NAME("madgrad_momentum")
  FO_STATES(grad_sum_sq, s, x0)
  FO_SCALARS(weight, pull, eps)

  static FO_HD float direction(float g, float p, float& grad_sum_sq, float& s, float& x0, const Scalars& c) {
    grad_sum_sq = grad_sum_sq + c.weight * (g * g);
    s = s + c.weight * g;
    return c.pull * ((p - x0) + Madgrad::distance(s, grad_sum_sq, c.eps));
  }
};

}  // namespace fo

FO_RULE(Madgrad)
FO_RULE(MadgradMomentum)
