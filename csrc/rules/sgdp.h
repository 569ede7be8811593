// SGDP: Heo et al. (arXiv 2006.08217), algorithm 1 without its projection (fusedopt/transforms/tangent.py). It differs from SGD with
// momentum in its numbers: no exception for the first step, and another decay.
#pragma once
#include "sgd.h"

namespace fo {

struct Sgdp : SgdMomentum {
  FO_NAME("sgdp")
};

}  // namespace fo

FO_RULE(Sgdp)
