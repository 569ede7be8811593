// INNAprop: Bolte et al., "A second-order-like optimizer with adaptive gradient scaling for deep learning" (arXiv 2410.05871),
// algorithm 1. u is the whole displacement of the parameter, its decay included: the step size is 1.
#pragma once
#include "../scalar.h"

namespace fo {

struct Innaprop : Elementwise {
  FO_NAME("innaprop")
  FO_STATES(psi, exp_avg_sq)
  FO_SCALARS(decay, beta2, weight2, debias2_sqrt, eps, psi_keep, psi_weight, share, speed, rate)

  static FO_HD float direction(float g, float p, float& psi, float& exp_avg_sq, const Scalars& c) {
    float shrunk = p - c.decay * p;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    psi = c.psi_keep * psi + c.psi_weight * shrunk;
    float scaled = div(g, sqrt(exp_avg_sq) * c.debias2_sqrt + c.eps);
    return c.decay * p - c.speed * (c.share * shrunk - psi) + c.rate * scaled;
  }
};

}  // namespace fo

FO_RULE(Innaprop)
