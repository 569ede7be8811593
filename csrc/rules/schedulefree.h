// Schedule-free SGD and AdamW: Defazio et al., "The Road Less Scheduled" (arXiv 2405.15682), algorithm 1. The parameter is y, where
// gradients are taken; x, its average, is not stored. u is the whole displacement of y: the step size is 1.
#pragma once
#include "../scalar.h"

namespace fo {

struct SchedulefreeSgd : Elementwise {
  FO_NAME("schedulefree_sgd")
  FO_STATES(z)
  FO_SCALARS(lr, back, average, weight_decay)

  static FO_HD float direction(float g, float p, float& z, const Scalars& c) {
    float d = g + c.weight_decay * p;
    float u = c.average * (p - z) + c.back * d;
    z = z - c.lr * d;
    return u;
  }
};

struct SchedulefreeAdamw : Elementwise {
  FO_NAME("schedulefree_adamw")
  FO_STATES(exp_avg_sq, z)
  FO_SCALARS(lr, back, average, weight_decay, beta2, weight2, debias2_sqrt, eps)

  static FO_HD float direction(float g, float p, float& exp_avg_sq, float& z, const Scalars& c) {
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    float scaled = div(g, sqrt(exp_avg_sq) * c.debias2_sqrt + c.eps);
    return SchedulefreeSgd::direction(scaled, p, z, {c.lr, c.back, c.average, c.weight_decay});
  }
};

}  // namespace fo

FO_RULE(SchedulefreeSgd)
FO_RULE(SchedulefreeAdamw)
