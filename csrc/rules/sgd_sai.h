// SGD-SaI: Xu et al. (arXiv 2412.11768), algorithm 1. snr is the tensor's own number, fixed at its first step (fusedopt/measures.py).
#pragma once
#include "../scalar.h"

namespace fo {

struct SgdSai : Elementwise {
  FO_NAME("sgd_sai")
  FO_STATES(momentum_buffer)
  FO_SCALARS(kept, weight, eps, first, snr)

  static FO_HD Pair terms(float g, float, const float&, const Scalars&) { return {g, g * g}; }

  static FO_HD float direction(float g, float, float& momentum_buffer, const Scalars& c) {
    momentum_buffer = c.kept * momentum_buffer + c.weight * g;
    return momentum_buffer * c.snr;
  }
};

}  // namespace fo

FO_RULE(SgdSai)
