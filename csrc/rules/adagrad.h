// Adagrad: Duchi, Hazan and Singer (JMLR 12, 2011), figure 1, diagonal; slow_down is 1 / (1 + (t - 1) lr_decay).
#pragma once
#include "../scalar.h"

namespace fo {

struct Adagrad : Elementwise {
  FO_NAME("adagrad")
  FO_STATES(sum)
  FO_SCALARS(slow_down, eps)

  static FO_HD float direction(float g, float, float& sum, const Scalars& c) {
    sum += g * g;
    return div(g * c.slow_down, sqrt(sum) + c.eps);
  }
};

}  // namespace fo

FO_RULE(Adagrad)
