// The stages around a rule's direction: prologue (unscale, clip, maximize, L2), the call, epilogue (trust ratio, lr, decoupled decay).
#pragma once
#include "scalar.h"

#include <type_traits>

namespace fo {

// Whether a probe sums the rule's own terms(g, p, states..., scalars) -> Pair in place of p^2 and u^2.
template <class Rule, class = void>
constexpr bool has_terms = false;
template <class Rule>
constexpr bool has_terms<Rule, std::void_t<decltype(&Rule::terms)>> = true;
// Whether it takes the largest of each term in place of their sums: a rule says `static constexpr bool largest = true;`.
template <class Rule, class = void>
constexpr bool takes_largest = false;
template <class Rule>
constexpr bool takes_largest<Rule, std::void_t<decltype(Rule::largest)>> = Rule::largest;
// Whether its direction takes z ~ N(0, 1) of each element after the parameter: a rule says `static constexpr bool noise = true;`.
template <class Rule, class = void>
constexpr bool takes_noise = false;
template <class Rule>
constexpr bool takes_noise<Rule, std::void_t<decltype(Rule::noise)>> = Rule::noise;
template <class Rule>
inline constexpr bool probes = Rule::trust_on == Trust::update || has_terms<Rule>;

// Numbers of one (launch, row): loaded once per chunk.
struct Stage {
  float grad_mul;  // 1 / loss scale * clip coefficient * (-1 if maximize)
  float l2;        // coupled decay
  float q;         // trust ratio on the gradient (LARS)
  float lr, decay; // learning rate times the trust ratio on the update (LAMB); lr * decoupled weight decay
};

FO_HD float unscale(const Launch& launch) {
  float mul = launch.grad_scale ? div(1.f, *launch.grad_scale) : 1.f;
  return launch.clip ? mul * *launch.clip : mul;
}

// torch.nn.utils.clip_grad_norm_'s coefficient
FO_HD float clip_coefficient(float norm, float max_norm) {
  float c = div(max_norm, norm + 1e-6f);
  return c > 1.f ? 1.f : c;  // a NaN norm stays NaN
}

template <class Rule>
FO_HD Stage make_stage(const Launch& launch, int phase, const Head& head, const typename Rule::Scalars& c, int64_t tensor) {
  float mul = unscale(launch);
  Stage s{mul * head.grad_sign, head.l2, 1.f, head.lr, head.decay};
  if (phase == kDirection) s.l2 = s.decay = 0.f, s.lr = -1.f;  // the epilogue of a parameter of 0 is then u
  if constexpr (Rule::trust_on == Trust::gradient) {
    s.q = Rule::trust(launch.sums[2 * tensor], launch.sums[2 * tensor + 1] * mul * mul, c);
  } else if constexpr (Rule::trust_on == Trust::update) {
    if (phase == kApply) s.lr = head.lr * Rule::trust(launch.sums[2 * tensor], launch.sums[2 * tensor + 1], c);
  }
  return s;
}

template <class Rule>
FO_HD float prologue(float g, float p, const Stage& s) {
  const float decayed = g * s.grad_mul + s.l2 * p;
  if constexpr (Rule::trust_on == Trust::gradient) return decayed * s.q;
  else return decayed;
}

// One rounding of p: decay and update are added first, so a decay below half an ulp of p is not lost on its own.
FO_HD float epilogue(float p, float u, const Stage& s) { return p - (s.lr * u + s.decay * p); }

// Calls Rule::direction with its states as named references (an array of states stops gcc 12 from vectorising).
template <class Rule>
FO_HD float direction(float g, float p, float z, float& a, float& b, float& c, float& d, const typename Rule::Scalars& k) {
  if constexpr (takes_noise<Rule>) {
    if constexpr (Rule::state_count == 0) return Rule::direction(g, p, z, k);
    else if constexpr (Rule::state_count == 1) return Rule::direction(g, p, z, a, k);
    else if constexpr (Rule::state_count == 2) return Rule::direction(g, p, z, a, b, k);
    else if constexpr (Rule::state_count == 3) return Rule::direction(g, p, z, a, b, c, k);
    else return Rule::direction(g, p, z, a, b, c, d, k);
  } else if constexpr (Rule::state_count == 0) return Rule::direction(g, p, k);
  else if constexpr (Rule::state_count == 1) return Rule::direction(g, p, a, k);
  else if constexpr (Rule::state_count == 2) return Rule::direction(g, p, a, b, k);
  else if constexpr (Rule::state_count == 3) return Rule::direction(g, p, a, b, c, k);
  else return Rule::direction(g, p, a, b, c, d, k);
}

template <class Rule>
FO_HD Pair terms(float g, float p, const float& a, const float& b, const float& c, const float& d, const typename Rule::Scalars& k) {
  if constexpr (Rule::state_count == 0) return Rule::terms(g, p, k);
  else if constexpr (Rule::state_count == 1) return Rule::terms(g, p, a, k);
  else if constexpr (Rule::state_count == 2) return Rule::terms(g, p, a, b, k);
  else if constexpr (Rule::state_count == 3) return Rule::terms(g, p, a, b, c, k);
  else return Rule::terms(g, p, a, b, c, d, k);
}

}  // namespace fo
