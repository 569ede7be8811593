// FAdam: Hwang (arXiv 2405.12807), algorithm 1. floor, clip_grad and clip_decay are the tensor's own numbers (fusedopt/measures.py).
#pragma once
#include "../scalar.h"

namespace fo {

struct FAdam : Elementwise {
  FO_NAME("fadam")
  FO_STATES(exp_avg, fisher_diag)
  FO_SCALARS(beta1, weight1, fisher, fisher_weight, weight_decay, eps, clip, floor, clip_grad, clip_decay)

  static FO_HD Pair terms(float g, float p, const float&, const float& fisher_diag, const Scalars& c) {
    const float inverse = div(1.f, sqrt(c.fisher * fisher_diag + c.fisher_weight * (g * g)) + c.floor);
    const float natural = g * inverse, decay = p * inverse;
    return {natural * natural, decay * decay};
  }

  static FO_HD float direction(float g, float p, float& exp_avg, float& fisher_diag, const Scalars& c) {
    fisher_diag = c.fisher * fisher_diag + c.fisher_weight * (g * g);
    const float scale = sqrt(fisher_diag) + c.floor;
    exp_avg = c.beta1 * exp_avg + c.weight1 * c.clip_grad * div(g, scale);
    return exp_avg + c.weight_decay * c.clip_decay * div(p, scale);
  }
};

}  // namespace fo

FO_RULE(FAdam)
