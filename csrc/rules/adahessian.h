// AdaHessian (arXiv 2006.00719, algorithm 1), OASIS (arXiv 2109.05198, with a fixed rate) and SANIA with Hutchinson's estimate (arXiv
// 2312.17369): `hessian`, an estimate of the Hessian's diagonal, is written between steps (fusedopt/curvature.py) and only read here.
#pragma once
#include "../scalar.h"

namespace fo {

struct AdaHessian : Elementwise {
  FO_NAME("adahessian")
  FO_STATES(exp_avg, exp_hessian_diag_sq, hessian)
  FO_SCALARS(beta1, weight1, beta2, weight2, debias1, debias2_sqrt, eps)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_hessian_diag_sq, float& hessian, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_hessian_diag_sq = c.beta2 * exp_hessian_diag_sq + c.weight2 * (hessian * hessian);
    return div(exp_avg * c.debias1, sqrt(exp_hessian_diag_sq) * c.debias2_sqrt + c.eps);
  }
};

struct Oasis : Elementwise {
  FO_NAME("oasis")
  FO_STATES(exp_avg, hessian)
  FO_SCALARS(beta1, weight1, least)

  static FO_HD float direction(float g, float, float& exp_avg, float& hessian, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    return div(exp_avg, max(c.least, abs(hessian)));
  }
};

struct SaniaHessian : Elementwise {
  FO_NAME("sania_hessian")
  FO_STATES(hessian)
  FO_SCALARS(sign, bound, eps)

  static FO_HD Pair terms(float g, float, const float& hessian, const Scalars& c) {
    return {div(g * g, max(c.eps, abs(hessian))), 0.f};
  }

  static FO_HD float direction(float g, float, float& hessian, const Scalars& c) { return div(g, max(c.eps, abs(hessian))); }
};

}  // namespace fo

FO_RULE(AdaHessian)
FO_RULE(Oasis)
FO_RULE(SaniaHessian)
