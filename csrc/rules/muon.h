// The momentum of Muon: that of SGD with other numbers, as an average. What follows is a matrix's (fusedopt/projections/orthogonal.py).
#pragma once
#include "sgd.h"

namespace fo {

struct MuonMomentum : SgdMomentum {
  FO_NAME("muon")
};

}  // namespace fo

FO_RULE(MuonMomentum)
