// Polyak step sizes: plain SPS (arXiv 2002.10542) and SANIA (arXiv 2312.17369). The step size is a number of the model
// (fusedopt/measures.py), in the row's learning rate.
#pragma once
#include "../scalar.h"

namespace fo {

struct Polyak : Elementwise {
  FO_NAME("polyak")
  FO_STATES()
  FO_SCALARS(sign, bound, scale, most)

  static FO_HD float direction(float g, float, const Scalars&) { return g; }
};

struct Sania : Elementwise {
  FO_NAME("sania")
  FO_STATES(exp_avg_sq)
  FO_SCALARS(sign, bound, kept, weight, debias, eps, root)

  static FO_HD float scaled(float g, float exp_avg_sq, const Scalars& c) {
    const float metric = max(c.eps, exp_avg_sq * c.debias);
    return div(g, c.root != 0.f ? sqrt(metric) : metric);
  }

  static FO_HD float next(float g, float exp_avg_sq, const Scalars& c) { return c.kept * exp_avg_sq + c.weight * (g * g); }

  static FO_HD Pair terms(float g, float, const float& exp_avg_sq, const Scalars& c) {
    return {g * scaled(g, next(g, exp_avg_sq, c), c), 0.f};
  }

  static FO_HD float direction(float g, float, float& exp_avg_sq, const Scalars& c) {
    exp_avg_sq = next(g, exp_avg_sq, c);
    return scaled(g, exp_avg_sq, c);
  }
};

}  // namespace fo

FO_RULE(Polyak)
FO_RULE(Sania)
