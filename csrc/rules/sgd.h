// SGD with momentum, dampening and Nesterov, in torch.optim.SGD's form (the learning rate stays outside the buffer).
#pragma once
#include "../scalar.h"

namespace fo {

struct Sgd : Elementwise {
  FO_NAME("sgd")
  FO_STATES()
  struct Scalars {};
  static constexpr const char* scalars = "";

  static FO_HD float direction(float g, float, const Scalars&) { return g; }
};

// The first step (buffer = g, no dampening) and Nesterov's look-ahead are numbers: momentum, weight, look_grad, look_buffer.
struct SgdMomentum : Elementwise {
  FO_NAME("sgd_momentum")
  FO_STATES(momentum_buffer)
  FO_SCALARS(momentum, weight, look_grad, look_buffer)

  static FO_HD float direction(float g, float, float& momentum_buffer, const Scalars& c) {
    momentum_buffer = c.momentum * momentum_buffer + c.weight * g;
    return c.look_grad * g + c.look_buffer * momentum_buffer;
  }
};

}  // namespace fo

FO_RULE(Sgd)
FO_RULE(SgdMomentum)
