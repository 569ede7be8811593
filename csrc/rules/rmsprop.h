// RMSprop: Tieleman and Hinton (lecture 6.5, 2012); centred: Graves (arXiv 1308.0850), equations 38 to 45. eps stands beside
// the root, or in it as TensorFlow has it: one of eps and eps_inside is 0.
#pragma once
#include "../scalar.h"

namespace fo {

struct Rmsprop : Elementwise {
  FO_NAME("rmsprop")
  FO_STATES(square_avg)
  FO_SCALARS(alpha, weight, eps, eps_inside, momentum, entering)

  static FO_HD float direction(float g, float, float& square_avg, const Scalars& c) {
    square_avg = c.alpha * square_avg + c.weight * (g * g);
    return div(g, sqrt(square_avg + c.eps_inside) + c.eps);
  }
};

struct RmspropMomentum : Elementwise {
  FO_NAME("rmsprop_momentum")
  FO_STATES(square_avg, momentum_buffer)
  FO_SCALARS(alpha, weight, eps, eps_inside, momentum, entering)

  static FO_HD float direction(float g, float, float& square_avg, float& momentum_buffer, const Scalars& c) {
    square_avg = c.alpha * square_avg + c.weight * (g * g);
    return momentum_buffer = c.momentum * momentum_buffer + c.entering * div(g, sqrt(square_avg + c.eps_inside) + c.eps);
  }
};

struct RmspropCentered : Elementwise {
  FO_NAME("rmsprop_centered")
  FO_STATES(square_avg, grad_avg)
  FO_SCALARS(alpha, weight, eps, eps_inside, momentum, entering)

  static FO_HD float direction(float g, float, float& square_avg, float& grad_avg, const Scalars& c) {
    square_avg = c.alpha * square_avg + c.weight * (g * g);
    grad_avg = c.alpha * grad_avg + c.weight * g;
    return div(g, sqrt(max(0.f, square_avg - grad_avg * grad_avg) + c.eps_inside) + c.eps);
  }
};

struct RmspropCenteredMomentum : Elementwise {
  FO_NAME("rmsprop_centered_momentum")
  FO_STATES(square_avg, grad_avg, momentum_buffer)
  FO_SCALARS(alpha, weight, eps, eps_inside, momentum, entering)

  static FO_HD float direction(float g, float, float& square_avg, float& grad_avg, float& momentum_buffer, const Scalars& c) {
    square_avg = c.alpha * square_avg + c.weight * (g * g);
    grad_avg = c.alpha * grad_avg + c.weight * g;
    return momentum_buffer = c.momentum * momentum_buffer + c.entering * div(g, sqrt(max(0.f, square_avg - grad_avg * grad_avg) + c.eps_inside) + c.eps);
  }
};

}  // namespace fo

FO_RULE(Rmsprop)
FO_RULE(RmspropMomentum)
FO_RULE(RmspropCentered)
FO_RULE(RmspropCenteredMomentum)
