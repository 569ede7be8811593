// Lion: Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675), algorithm 2.
#pragma once
#include "cautious.h"

namespace fo {

struct Lion : Elementwise {
  FO_NAME("lion")
  FO_STATES(exp_avg)
  FO_SCALARS(beta1, weight1, beta2, weight2)

  static FO_HD float direction(float g, float, float& exp_avg, const Scalars& c) {
    float u = sign(c.beta1 * exp_avg + c.weight1 * g);
    exp_avg = c.beta2 * exp_avg + c.weight2 * g;
    return u;
  }
};

struct LionCautious : Cautious {
  FO_NAME("lion_cautious")
  FO_STATES(exp_avg)
  FO_SCALARS(beta1, weight1, beta2, weight2, kept_add, kept_floor)

  static FO_HD float blind(float g, float p, float& exp_avg, const Scalars& c) {
    return Lion::direction(g, p, exp_avg, {c.beta1, c.weight1, c.beta2, c.weight2});
  }

  static FO_HD Pair terms(float g, float p, float exp_avg, const Scalars& c) { return {1.f, agree(blind(g, p, exp_avg, c), g)}; }

  static FO_HD float direction(float g, float p, float& exp_avg, const Scalars& c) { return keep(blind(g, p, exp_avg, c), g); }
};

}  // namespace fo

FO_RULE(Lion)
FO_RULE(LionCautious)
