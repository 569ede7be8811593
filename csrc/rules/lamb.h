// LAMB: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (arXiv 1904.00962), algorithm 2.
// Decay belongs to the direction, whose norm enters the trust ratio.
#pragma once
#include "adam.h"

namespace fo {

struct Lamb {
  static constexpr Trust trust_on = Trust::update;
  FO_NAME("lamb")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps, weight_decay, adapt, trust_clip)

  static FO_HD float trust(float param_sq, float update_sq, const Scalars& c) {
    float r = param_sq > 0.f && update_sq > 0.f ? div(sqrt(param_sq), sqrt(update_sq)) : 1.f;
    r = c.trust_clip > 0.f ? min(r, 1.f) : r;
    return c.adapt > 0.f ? r : 1.f;
  }

  static FO_HD float direction(float g, float p, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    float adam = Adam::direction(g, p, exp_avg, exp_avg_sq,
                                 {c.beta1, c.weight1, c.beta2, c.weight2, c.debias1, c.debias2_sqrt, c.eps});
    return adam + c.weight_decay * p;
  }
};

}  // namespace fo

FO_RULE(Lamb)
