// Adadelta: Zeiler (arXiv 1212.5701), algorithm 1.
#pragma once
#include "../scalar.h"

namespace fo {

struct Adadelta : Elementwise {
  FO_NAME("adadelta")
  FO_STATES(square_avg, acc_delta)
  FO_SCALARS(rho, weight, eps)

  static FO_HD float direction(float g, float, float& square_avg, float& acc_delta, const Scalars& c) {
    square_avg = c.rho * square_avg + c.weight * (g * g);
    float u = div(sqrt(acc_delta + c.eps), sqrt(square_avg + c.eps)) * g;
    acc_delta = c.rho * acc_delta + c.weight * (u * u);
    return u;
  }
};

}  // namespace fo

FO_RULE(Adadelta)
