// SWATS: Keskar and Socher (arXiv 1712.07628), algorithm 1. The phase is in four numbers of the model or the tensor
// (fusedopt/measures.py): adam is its step size until the switch, sgd the rate after it; the other one is 0.
#pragma once
#include "../scalar.h"

namespace fo {

struct Swats : Elementwise {
  FO_NAME("swats")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, beta2, weight2, eps, rate, debias2, later, tolerance, kept, entering, adam, sgd)

  static FO_HD Pair terms(float g, float, const float& exp_avg, const float& exp_avg_sq, const Scalars& c) {
    const float v = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    const float u = div((c.kept * exp_avg + c.entering * g) * c.adam, sqrt(v) + c.eps);
    return {u * g, u * u};
  }

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    exp_avg = c.kept * exp_avg + c.entering * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    return div(exp_avg * c.adam, sqrt(exp_avg_sq) + c.eps) + exp_avg * c.sgd;
  }
};

struct SwatsPerTensor : Swats {
  FO_NAME("swats_per_tensor")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, beta2, weight2, eps, rate, debias2, later, tolerance, kept, entering, adam, sgd)

  static FO_HD Swats::Scalars same(const Scalars& c) {
    return {c.beta1, c.beta2, c.weight2, c.eps, c.rate, c.debias2, c.later, c.tolerance, c.kept, c.entering, c.adam, c.sgd};
  }

  static FO_HD Pair terms(float g, float p, const float& exp_avg, const float& exp_avg_sq, const Scalars& c) {
    return Swats::terms(g, p, exp_avg, exp_avg_sq, same(c));
  }

  static FO_HD float direction(float g, float p, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    return Swats::direction(g, p, exp_avg, exp_avg_sq, same(c));
  }
};

}  // namespace fo

FO_RULE(Swats)
FO_RULE(SwatsPerTensor)
