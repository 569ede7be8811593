// DoG and L-DoG: Ivgi et al. (arXiv 2302.12022): SGD whose learning rate is measured (fusedopt/measures.py) from |p - p_0| and |g| of
// a group or of a tensor. moved = 0 before there is a p_0 to be away from: then the sum is |p|^2.
#pragma once
#include "../scalar.h"

namespace fo {

struct Dog : Elementwise {
  FO_NAME("dog")
  FO_STATES(initial_param)
  FO_SCALARS(reps_rel, eps, moved)

  static FO_HD Pair terms(float g, float p, const float& initial_param, const Scalars& c) {
    const float away = p - c.moved * initial_param;
    return {away * away, g * g};
  }

  static FO_HD float direction(float g, float, float&, const Scalars&) { return g; }
};

struct LDog : Elementwise {
  FO_NAME("ldog")
  FO_STATES(initial_param)
  FO_SCALARS(reps_rel, eps, moved)

  static FO_HD Pair terms(float g, float p, const float& initial_param, const Scalars& c) {
    return Dog::terms(g, p, initial_param, {c.reps_rel, c.eps, c.moved});
  }

  static FO_HD float direction(float g, float, float&, const Scalars&) { return g; }
};

}  // namespace fo

FO_RULE(Dog)
FO_RULE(LDog)
