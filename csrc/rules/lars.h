// LARS: You et al., "Large Batch Training of Convolutional Networks" (arXiv 1708.03888), algorithm 1; the momentum is torch.optim.SGD's.
// The trust ratio scales the decayed gradient before it enters the buffer.
#pragma once
#include "sgd.h"

namespace fo {

struct Lars {
  static constexpr Trust trust_on = Trust::gradient;
  FO_NAME("lars")
  FO_STATES()
  FO_SCALARS(coefficient, weight_decay, eps, adapt, clip_lr)

  // adapt = 0 leaves the gradient alone; clip_lr > 0 limits the effective rate lr * q to lr.
  static FO_HD float trust(float param_sq, float grad_sq, const Scalars& c) {
    float param_norm = sqrt(param_sq), grad_norm = sqrt(grad_sq);
    float q = div(c.coefficient * param_norm, grad_norm + c.weight_decay * param_norm + c.eps);
    q = param_norm > 0.f && grad_norm > 0.f ? q : 1.f;
    q = c.clip_lr > 0.f ? min(div(q, c.clip_lr), 1.f) : q;
    return c.adapt > 0.f ? q : 1.f;
  }

  static FO_HD float direction(float g, float, const Scalars&) { return g; }
};

struct LarsMomentum {
  static constexpr Trust trust_on = Trust::gradient;
  FO_NAME("lars_momentum")
  FO_STATES(momentum_buffer)
  FO_SCALARS(coefficient, weight_decay, eps, adapt, clip_lr, momentum, weight, look_grad, look_buffer)

  static FO_HD float trust(float param_sq, float grad_sq, const Scalars& c) {
    return Lars::trust(param_sq, grad_sq, {c.coefficient, c.weight_decay, c.eps, c.adapt, c.clip_lr});
  }

  static FO_HD float direction(float g, float, float& momentum_buffer, const Scalars& c) {
    return SgdMomentum::direction(g, 0.f, momentum_buffer, {c.momentum, c.weight, c.look_grad, c.look_buffer});
  }
};

}  // namespace fo

FO_RULE(Lars)
FO_RULE(LarsMomentum)
