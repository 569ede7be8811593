// Steps to the edge of an l-infinity or l2 ball along the momentum (arXiv 2503.12645, algorithm 1). inverse, one over the norm, is a
// number of the tensor or of all of them (fusedopt/measures.py). The noisy ones keep the last gradient, whose change they measure.
#pragma once
#include "../scalar.h"

namespace fo {

struct TrustSign : Elementwise {
  FO_NAME("trust_sign")
  FO_STATES(momentum_buffer)
  FO_SCALARS(momentum, weight)

  static FO_HD float direction(float g, float, float& momentum_buffer, const Scalars& c) {
    momentum_buffer = c.momentum * momentum_buffer + c.weight * g;
    return sign(momentum_buffer);
  }
};

struct TrustUnit : Elementwise {
  FO_NAME("trust_unit")
  FO_STATES(momentum_buffer)
  FO_SCALARS(momentum, weight, rms, eps, inverse)

  static FO_HD Pair terms(float g, float, const float& momentum_buffer, const Scalars& c) {
    const float m = c.momentum * momentum_buffer + c.weight * g;
    return {m * m, 0.f};
  }

  static FO_HD float direction(float g, float, float& momentum_buffer, const Scalars& c) {
    momentum_buffer = c.momentum * momentum_buffer + c.weight * g;
    return momentum_buffer * c.inverse;
  }
};

struct TrustUnitGlobal : TrustUnit {
  FO_NAME("trust_unit_global")
  FO_STATES(momentum_buffer)
  FO_SCALARS(momentum, weight, rms, eps, inverse)

  static FO_HD TrustUnit::Scalars same(const Scalars& c) { return {c.momentum, c.weight, c.rms, c.eps, c.inverse}; }

  static FO_HD Pair terms(float g, float p, const float& momentum_buffer, const Scalars& c) {
    return TrustUnit::terms(g, p, momentum_buffer, same(c));
  }

  static FO_HD float direction(float g, float p, float& momentum_buffer, const Scalars& c) {
    return TrustUnit::direction(g, p, momentum_buffer, same(c));
  }
};

struct TrustNoisySign : Elementwise {
  FO_NAME("trust_noisy_sign")
  FO_STATES(momentum_buffer, previous_grad)
  FO_SCALARS(momentum, weight, alpha, beta2, weight2)

  static FO_HD Pair terms(float g, float, const float&, const float& previous_grad, const Scalars&) {
    return {abs(g - previous_grad), 0.f};
  }

  static FO_HD float direction(float g, float, float& momentum_buffer, float& previous_grad, const Scalars& c) {
    momentum_buffer = c.momentum * momentum_buffer + c.weight * g;
    previous_grad = g;
    return sign(momentum_buffer);
  }
};

struct TrustNoisyUnit : Elementwise {
  FO_NAME("trust_noisy_unit")
  FO_STATES(momentum_buffer, previous_grad)
  FO_SCALARS(momentum, weight, rms, eps, inverse, alpha, beta2, weight2)

  static FO_HD Pair terms(float g, float, const float& momentum_buffer, const float& previous_grad, const Scalars& c) {
    const float change = g - previous_grad, m = c.momentum * momentum_buffer + c.weight * g;
    return {m * m, change * change};
  }

  static FO_HD float direction(float g, float, float& momentum_buffer, float& previous_grad, const Scalars& c) {
    momentum_buffer = c.momentum * momentum_buffer + c.weight * g;
    previous_grad = g;
    return momentum_buffer * c.inverse;
  }
};

}  // namespace fo

FO_RULE(TrustSign)
FO_RULE(TrustUnit)
FO_RULE(TrustUnitGlobal)
FO_RULE(TrustNoisySign)
FO_RULE(TrustNoisyUnit)
