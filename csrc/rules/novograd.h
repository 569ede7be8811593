// NovoGrad: Ginsburg et al. (arXiv 1905.11286), algorithm 1. inverse = 1 / (sqrt(v) + eps) is the tensor's own (fusedopt/measures.py).
#pragma once
#include "../scalar.h"

namespace fo {

struct NovoGrad : Elementwise {
  FO_NAME("novograd")
  FO_STATES(exp_avg)
  FO_SCALARS(beta1, weight, weight_decay, kept, eps, inverse)

  static FO_HD float direction(float g, float p, float& exp_avg, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight * (g * c.inverse + c.weight_decay * p);
    return exp_avg;
  }
};

}  // namespace fo

FO_RULE(NovoGrad)
