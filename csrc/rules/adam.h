// Adam: Kingma and Ba (arXiv 1412.6980), algorithm 1; AMSGrad: Reddi et al. (arXiv 1904.09237), algorithm 2, debiased as torch.optim does.
// AdamW (arXiv 1711.05101) is the same direction with the decay in the epilogue.
#pragma once
#include "cautious.h"

namespace fo {

struct Adam : Elementwise {
  FO_NAME("adam")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    return div(exp_avg * c.debias1, sqrt(exp_avg_sq) * c.debias2_sqrt + c.eps);
  }
};

struct AdamAmsgrad : Elementwise {
  FO_NAME("adam_amsgrad")
  FO_STATES(exp_avg, exp_avg_sq, max_exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, float& max_exp_avg_sq, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.weight2 * (g * g);
    max_exp_avg_sq = max(exp_avg_sq, max_exp_avg_sq);
    return div(exp_avg * c.debias1, sqrt(max_exp_avg_sq) * c.debias2_sqrt + c.eps);
  }
};

struct AdamCautious : Cautious {
  FO_NAME("adam_cautious")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps, kept_add, kept_floor)

  static FO_HD float blind(float g, float p, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    return Adam::direction(g, p, exp_avg, exp_avg_sq,
                           {c.beta1, c.weight1, c.beta2, c.weight2, c.debias1, c.debias2_sqrt, c.eps});
  }

  static FO_HD Pair terms(float g, float p, float exp_avg, float exp_avg_sq, const Scalars& c) {
    return {1.f, agree(blind(g, p, exp_avg, exp_avg_sq, c), g)};
  }

  static FO_HD float direction(float g, float p, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    return keep(blind(g, p, exp_avg, exp_avg_sq, c), g);
  }
};

struct AdamAmsgradCautious : Cautious {
  FO_NAME("adam_amsgrad_cautious")
  FO_STATES(exp_avg, exp_avg_sq, max_exp_avg_sq)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps, kept_add, kept_floor)

  static FO_HD float blind(float g, float p, float& exp_avg, float& exp_avg_sq, float& max_exp_avg_sq, const Scalars& c) {
    return AdamAmsgrad::direction(g, p, exp_avg, exp_avg_sq, max_exp_avg_sq,
                                  {c.beta1, c.weight1, c.beta2, c.weight2, c.debias1, c.debias2_sqrt, c.eps});
  }

  static FO_HD Pair terms(float g, float p, float exp_avg, float exp_avg_sq, float max_exp_avg_sq, const Scalars& c) {
    return {1.f, agree(blind(g, p, exp_avg, exp_avg_sq, max_exp_avg_sq, c), g)};
  }

  static FO_HD float direction(float g, float p, float& exp_avg, float& exp_avg_sq, float& max_exp_avg_sq, const Scalars& c) {
    return keep(blind(g, p, exp_avg, exp_avg_sq, max_exp_avg_sq, c), g);
  }
};

}  // namespace fo

FO_RULE(Adam)
FO_RULE(AdamAmsgrad)
FO_RULE(AdamCautious)
FO_RULE(AdamAmsgradCautious)
