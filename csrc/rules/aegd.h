// AEGD: Liu and Tian (arXiv 2010.05109), algorithm 1, and with momentum. root = sqrt(L + c) and inverse = 1 / (2 root) are numbers
// of the step (fusedopt/measures.py).
#pragma once
#include "../scalar.h"

namespace fo {

struct Aegd : Elementwise {
  FO_NAME("aegd")
  FO_STATES(energy)
  FO_SCALARS(rate, shift, sign, first, weight_decay, root, inverse)

  static FO_HD float direction(float g, float p, float& energy, const Scalars& c) {
    const float q = g * c.inverse + c.weight_decay * p;
    energy = div(c.first != 0.f ? c.root : energy, 1.f + c.rate * (q * q));
    return 2.f * energy * q;
  }
};

struct AegdMomentum : Elementwise {
  FO_NAME("aegd_momentum")
  FO_STATES(energy, momentum_buffer)
  FO_SCALARS(rate, shift, sign, first, weight_decay, root, inverse, momentum)

  static FO_HD float direction(float g, float p, float& energy, float& momentum_buffer, const Scalars& c) {
    const float q = g * c.inverse + c.weight_decay * p;
    momentum_buffer = c.momentum * momentum_buffer + q;
    energy = div(c.first != 0.f ? c.root : energy, 1.f + c.rate * (q * q));
    return 2.f * energy * momentum_buffer;
  }
};

}  // namespace fo

FO_RULE(Aegd)
FO_RULE(AegdMomentum)
