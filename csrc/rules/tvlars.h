// TVLARS: Do et al. (arXiv 2309.14053). The ratio q is the tensor's own number (fusedopt/measures.py), from |p| and |g + l2 p|.
#pragma once
#include "../scalar.h"

namespace fo {

struct Tvlars : Elementwise {
  FO_NAME("tvlars")
  FO_STATES(momentum_buffer)
  FO_SCALARS(momentum, coefficient, q)

  static FO_HD Pair terms(float g, float p, const float&, const Scalars&) { return {p * p, g * g}; }

  static FO_HD float direction(float g, float, float& momentum_buffer, const Scalars& c) {
    momentum_buffer = c.momentum * momentum_buffer + c.q * g;
    return momentum_buffer;
  }
};

}  // namespace fo

FO_RULE(Tvlars)
