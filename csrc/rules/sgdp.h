// SGDP: Heo et al. (arXiv 2006.08217), algorithm 1 without its projection (fusedopt/transforms/tangent.py). It differs from SGD with
// momentum in its numbers: no exception for the first step, and another decay.
#pragma once
#include "sgd.h"

namespace fo {

struct Sgdp : Elementwise {
  FO_NAME("sgdp")
  FO_STATES(momentum_buffer)
  FO_SCALARS(momentum, weight, look_grad, look_buffer)

  static FO_HD float direction(float g, float p, float& momentum_buffer, const Scalars& c) {
    return SgdMomentum::direction(g, p, momentum_buffer, {c.momentum, c.weight, c.look_grad, c.look_buffer});
  }
};

}  // namespace fo

FO_RULE(Sgdp)
