// DASA, OASIS with its adaptive rate (arXiv 2109.05198): the rate, a number of the whole model, multiplies the row's learning rate. It
// comes from how far parameters and gradients moved since the last step, in the norm of the diagonal and in its dual.
#pragma once
#include "../scalar.h"

namespace fo {

struct Dasa : Elementwise {
  FO_NAME("dasa")
  FO_STATES(last_param, last_grad, hessian)
  FO_SCALARS(least, initial_rate)

  static FO_HD float metric(float hessian, const Scalars& c) { return max(c.least, abs(hessian)); }

  static FO_HD Pair terms(float g, float p, const float& last_param, const float& last_grad, const float& hessian,
                          const Scalars& c) {
    const float moved = p - last_param, changed = g - last_grad, d = metric(hessian, c);
    return {d * (moved * moved), div(changed * changed, d)};
  }

  static FO_HD float direction(float g, float p, float& last_param, float& last_grad, float& hessian, const Scalars& c) {
    last_param = p;
    last_grad = g;
    return div(g, metric(hessian, c));
  }
};

}  // namespace fo

FO_RULE(Dasa)
