// A-DoG (arXiv 2404.00666, its experiments): step sizes and the share of the weighted point are measured (fusedopt/measures.py) from
// <g, w - p_0> and |g|^2 of a group; fresh = 1 before there is a p_0, and the first sum is |p|^2. displacement is w - p_0. u is the whole
// displacement of p, so the row's learning rate is 1.
#pragma once
#include "../scalar.h"

namespace fo {

struct Adog : Elementwise {
  FO_NAME("adog")
  FO_STATES(initial_param, displacement)
  FO_SCALARS(reps_rel, eps, rate, growth, fresh, size, weighted_size, mix)

  static FO_HD Pair terms(float g, float p, const float&, const float& displacement, const Scalars& c) {
    return {g * displacement + c.fresh * (p * p), g * g};
  }

  static FO_HD float direction(float g, float p, float& initial_param, float& displacement, const Scalars& c) {
    displacement -= c.weighted_size * g;
    return (1.f - c.mix) * c.size * g + c.mix * ((p - initial_param) - displacement);
  }
};

}  // namespace fo

FO_RULE(Adog)
