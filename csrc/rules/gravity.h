// Gravity: Bahrami and Pourasad Zadeh (arXiv 2101.09192), algorithm 1. peak = max |g| is the tensor's own (fusedopt/measures.py).
#pragma once
#include "../scalar.h"

namespace fo {

struct Gravity : Elementwise {
  FO_NAME("gravity")
  FO_STATES(velocity)
  FO_SCALARS(kept, weight, peak)
  static constexpr bool largest = true;

  static FO_HD Pair terms(float g, float, const float&, const Scalars&) { return {abs(g), 0.f}; }

  static FO_HD float direction(float g, float, float& velocity, const Scalars& c) {
    const float relative = g * c.peak;
    velocity = c.kept * velocity + c.weight * div(g, 1.f + relative * relative);
    return velocity;
  }
};

}  // namespace fo

FO_RULE(Gravity)
