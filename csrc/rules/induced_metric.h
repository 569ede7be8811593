// Induced-metric SGD and RMSprop (arXiv 2509.03594): the factor of the step is a number of the group (fusedopt/measures.py), in the
// row's learning rate.
#pragma once
#include "../scalar.h"

namespace fo {

struct InducedMetric : Elementwise {
  FO_NAME("induced_metric")
  FO_STATES(exp_avg)
  FO_SCALARS(momentum, weight, debias, xi, beta, slope_debias)

  static FO_HD float direction(float g, float, float& exp_avg, const Scalars& c) {
    exp_avg = c.momentum * exp_avg + c.weight * g;
    return exp_avg * c.debias;
  }
};

// The factor follows from the loss too.
struct InducedMetricLog : Elementwise {
  FO_NAME("induced_metric_log")
  FO_STATES(exp_avg)
  FO_SCALARS(momentum, weight, debias, xi, beta, slope_debias, sign)

  static FO_HD float direction(float g, float, float& exp_avg, const Scalars& c) {
    exp_avg = c.momentum * exp_avg + c.weight * g;
    return exp_avg * c.debias;
  }
};

struct InducedMetricRms : Elementwise {
  FO_NAME("induced_metric_rms")
  FO_STATES(exp_avg, exp_avg_sq)
  FO_SCALARS(momentum, weight, debias, xi, beta, slope_debias, alpha, rms_weight, rms_debias_sqrt, eps)

  static FO_HD Pair terms(float g, float, const float&, const float& exp_avg_sq, const Scalars& c) {
    const float v = c.alpha * exp_avg_sq + c.rms_weight * (g * g);
    return {div(g * g, sqrt(v) * c.rms_debias_sqrt + c.eps), 0.f};
  }

  static FO_HD float direction(float g, float, float& exp_avg, float& exp_avg_sq, const Scalars& c) {
    exp_avg = c.momentum * exp_avg + c.weight * g;
    exp_avg_sq = c.alpha * exp_avg_sq + c.rms_weight * (g * g);
    return div(exp_avg * c.debias, sqrt(exp_avg_sq) * c.rms_debias_sqrt + c.eps);
  }
};

}  // namespace fo

FO_RULE(InducedMetric)
FO_RULE(InducedMetricLog)
FO_RULE(InducedMetricRms)
