// Lion: Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675), algorithm 2.
#pragma once
#include "../scalar.h"

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

}  // namespace fo

FO_RULE(Lion)
