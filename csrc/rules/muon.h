// The momentum of Muon: that of SGD with other numbers, as an average. What follows is a matrix's (fusedopt/projections/orthogonal.py).
#pragma once
#include "sgd.h"

namespace fo {

struct MuonMomentum : SgdMomentum {
  FO_NAME("muon")
};

struct Difference : Elementwise {
  FO_NAME("difference")
  FO_STATES(previous_grad)
  struct Scalars {};
  static constexpr const char* scalars = "";

  static FO_HD float direction(float g, float, float& previous_grad, const Scalars&) {
    const float change = g - previous_grad;
    previous_grad = g;
    return change;
  }
};

}  // namespace fo

FO_RULE(MuonMomentum)
FO_RULE(Difference)
