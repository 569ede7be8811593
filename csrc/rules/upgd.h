// UPGD: Elsayed and Mahmood, "Addressing Loss of Plasticity and Catastrophic Forgetting in Continual Learning" (arXiv 2404.00781).
// gain = 1 / ((1 - beta^t) max over all tensors of the utility) is a number of the model (fusedopt/measures.py).
#pragma once
#include "../scalar.h"

namespace fo {

FO_HD float utility_of(float g, float p, float utility, float kept, float weight) { return kept * utility - weight * (g * p); }

// 1 - sigmoid(x)
FO_HD float plasticity(float x) {
  const float e = exp_of_negative(-abs(x));
  return div(x > 0.f ? e : 1.f, 1.f + e);
}

struct Upgd : Elementwise {
  FO_NAME("upgd")
  FO_STATES(utility)
  FO_SCALARS(kept, weight, debias, sigma, protects, gain)
  static constexpr bool largest = true, noise = true;

  static FO_HD Pair terms(float g, float p, const float& utility, const Scalars& c) {
    return {utility_of(g, p, utility, c.kept, c.weight), 0.f};
  }

  static FO_HD float direction(float g, float p, float z, float& utility, const Scalars& c) {
    utility = utility_of(g, p, utility, c.kept, c.weight);
    const float free = plasticity(utility * c.gain);
    return g * (c.protects != 0.f ? free : 1.f) + c.sigma * z * free;
  }
};

struct UpgdAdaptive : Elementwise {
  FO_NAME("upgd_adaptive")
  FO_STATES(exp_avg, exp_avg_sq, utility)
  FO_SCALARS(kept, weight, debias, sigma, beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps, gain)
  static constexpr bool largest = true, noise = true;

  static FO_HD Pair terms(float g, float p, const float&, const float&, const float& utility, const Scalars& c) {
    return {utility_of(g, p, utility, c.kept, c.weight), 0.f};
  }

  static FO_HD float direction(float g, float p, float z, float& exp_avg, float& exp_avg_sq, float& utility, const Scalars& c) {
    utility = utility_of(g, p, utility, c.kept, c.weight);
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    const float step = div(exp_avg * c.debias1, sqrt(exp_avg_sq) * c.debias2_sqrt + c.eps);
    return (step + c.sigma * z) * plasticity(utility * c.gain);
  }
};

}  // namespace fo

FO_RULE(Upgd)
FO_RULE(UpgdAdaptive)
