// Cautious optimizers: Liang et al. (arXiv 2411.16085), algorithm 1: an update moves only where its sign is the gradient's. The
// probe counts the elements that stay; the learning rate of the tensor is scaled by them (fusedopt/rules/cautious.py).
#pragma once
#include "../scalar.h"

namespace fo {

struct Cautious : Elementwise {
  static FO_HD float agree(float u, float g) { return ((u > 0.f) & (g > 0.f)) | ((u < 0.f) & (g < 0.f)) ? 1.f : 0.f; }
  static FO_HD float keep(float u, float g) { return u * agree(u, g); }  // NaN stays NaN
};

}  // namespace fo
