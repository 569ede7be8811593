// The corrected gradient of MARS-Shampoo (arXiv 2411.10438, algorithm 4). Its clipping and its average are other launches.
#pragma once
#include "mars.h"

namespace fo {

struct MarsCorrected : Elementwise {
  FO_NAME("mars_corrected")
  FO_STATES(previous_grad)
  FO_SCALARS(change)

  static FO_HD float direction(float g, float, float& previous_grad, const Scalars& c) {
    const float x = mars_correct(g, previous_grad, c.change);
    previous_grad = g;
    return x;
  }
};

}  // namespace fo

FO_RULE(MarsCorrected)
