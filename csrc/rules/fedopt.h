// FedAdam, FedAdagrad and FedYogi: Reddi et al. (arXiv 2003.00295), algorithm 2, server side; g is minus the clients' mean change.
#pragma once
#include "../scalar.h"

namespace fo {

// FedAdagrad is keep = enter = 1.
struct FedAdam : Elementwise {
  FO_NAME("fed_adam")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, keep, enter, tau)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    exp_avg_sq = c.keep * exp_avg_sq + c.enter * (g * g);
    return div(exp_avg, sqrt(exp_avg_sq) + c.tau);
  }
};

struct FedYogi : Elementwise {
  FO_NAME("fed_yogi")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(beta1, weight1, keep, enter, tau)

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    exp_avg = c.beta1 * exp_avg + c.weight1 * g;
    float square = g * g;
    exp_avg_sq -= c.enter * square * sign(exp_avg_sq - square);
    return div(exp_avg, sqrt(exp_avg_sq) + c.tau);
  }
};

}  // namespace fo

FO_RULE(FedAdam)
FO_RULE(FedYogi)
