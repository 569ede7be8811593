// The multi-tensor step on a CPU: for every chunk of the launch decode, rule, encode. Compiled once per rule and instruction set.
//
// fp32 and bf16 streams are stepped where they lie, in one vectorised loop; all others, and bf16 parameters without AVX-512, go
// through buffers (blocks.h).
// Each element belongs to exactly one chunk; the last chunk of a row and its last tile are short.
#pragma once
#include "../precision.h"
#include "../stages.h"
#include "blocks.h"
#include "parallel.h"
#include "reduce.h"
#include "tile.h"

namespace fo {

static FO_HD float load(float x) { return x; }
static FO_HD float load(uint16_t x) { return bf16_to_float(x); }
static FO_HD void store(float* to, float x) { *to = x; }
static FO_HD void store(uint16_t* to, float x) { *to = float_to_bf16(x); }

// Steps n elements of streams that are fp32 or bf16 (uint16_t). Without Store it writes the update to `u` and nothing else.
// Unused states are null.
template <class Rule, bool Store, class G, class P, class S>
static __attribute__((noinline)) void update(int64_t n, const G* __restrict g, P* __restrict p, S* __restrict state0,
                                             S* __restrict state1, S* __restrict state2, S* __restrict state3,
                                             const float* __restrict noise, float* __restrict u, const Stage s, const typename Rule::Scalars scalars) {
  constexpr int states = Rule::state_count;
  for (int64_t i = 0; i < n; ++i) {
    float x = load(p[i]), a = 0.f, b = 0.f, c = 0.f, d = 0.f;
    if constexpr (states > 0) a = load(state0[i]);
    if constexpr (states > 1) b = load(state1[i]);
    if constexpr (states > 2) c = load(state2[i]);
    if constexpr (states > 3) d = load(state3[i]);
    float z = 0.f;
    if constexpr (takes_noise<Rule>) z = noise[i];
    float direct = direction<Rule>(prologue<Rule>(load(g[i]), x, s), x, z, a, b, c, d, scalars);
    if constexpr (Store) {
      if constexpr (states > 0) store(state0 + i, a);
      if constexpr (states > 1) store(state1 + i, b);
      if constexpr (states > 2) store(state2 + i, c);
      if constexpr (states > 3) store(state3 + i, d);
      store(p + i, epilogue(x, direct, s));
    } else {
      u[i] = direct;
    }
  }
}

// The two terms of n elements, from fp32 arrays. Unused states are null.
template <class Rule>
static __attribute__((noinline)) void take_terms(int64_t n, const float* __restrict g, const float* __restrict p,
                                                 const float* __restrict state0, const float* __restrict state1,
                                                 const float* __restrict state2, const float* __restrict state3,
                                                 float* __restrict first, float* __restrict second, const Stage s,
                                                 const typename Rule::Scalars scalars) {
  constexpr int states = Rule::state_count;
  for (int64_t i = 0; i < n; ++i) {
    float a = 0.f, b = 0.f, c = 0.f, d = 0.f;
    if constexpr (states > 0) a = state0[i];
    if constexpr (states > 1) b = state1[i];
    if constexpr (states > 2) c = state2[i];
    if constexpr (states > 3) d = state3[i];
    const Pair t = terms<Rule>(prologue<Rule>(g[i], p[i], s), p[i], a, b, c, d, scalars);
    first[i] = t.first;
    second[i] = t.second;
  }
}

// A chunk whose streams are all stepped where they lie.
template <class Rule>
struct InPlace {
  const Launch& launch;
  const Row& row;
  int64_t start, n;
  const Stage& stage;
  const typename Rule::Scalars& scalars;

  template <class T>
  T* at(int column) const { return reinterpret_cast<T*>(row[column]) + start; }

  template <class G, class P, class S>
  void run() const {
    S* s[kMaxStates] = {};
    for (int i = 0; i < Rule::state_count; ++i) s[i] = at<S>(kState + i);
    update<Rule, true>(n, at<const G>(kGrad), at<P>(kParam), s[0], s[1], s[2], s[3], nullptr, nullptr, stage, scalars);
  }

  template <class G, class P>
  bool by_state() const {
    bool fp32 = true, bf16 = Rule::state_count > 0;
    for (int i = 0; i < Rule::state_count; ++i) {
      fp32 &= (launch.formats[i] & kFormatMask) == kFormatF32;
      bf16 &= (launch.formats[i] & kFormatMask) == kFormatBF16;
    }
    if (fp32) run<G, P, float>();
    else if (bf16) run<G, P, uint16_t>();
    return fp32 || bf16;
  }

  template <class G>
  bool by_param() const {
    if (launch.param_dtype == kF32) return by_state<G, float>();
#if defined(__AVX512F__)
    return launch.param_dtype == kBF16 && launch.precision == kNearest && by_state<G, uint16_t>();
#else
    return false;  // narrower vectors: through buffers AdamW takes a fifth less time, in cache and from memory
#endif
  }

  // False where a stream needs decoding through a buffer.
  bool operator()() const {
    if (launch.grad_dtype == kF32) return by_param<float>();
    return launch.grad_dtype == kBF16 && by_param<uint16_t>();
  }
};

template <class Rule, bool Store>
static void step_chunk(const Launch& launch, int64_t chunk) {
  const Row row(launch, chunk >> 32);
  const int64_t start = (chunk & 0xFFFFFFFF) * launch.chunk, left = row[kNumel] - start;
  const int64_t n = left < launch.chunk ? left : launch.chunk;
  const int64_t tensor = row.tensor();

  Head head;
  typename Rule::Scalars scalars;
  const float* numbers = launch.scalars + row.scalar_row() * kScalarStride;
  std::memcpy(&head, numbers, sizeof head);
  std::memcpy(&scalars, numbers + kScalarHead, sizeof scalars);
  const Stage stage = make_stage<Rule>(launch, launch.phase, head, scalars, tensor);

  int64_t blocked = 0;
  constexpr bool kNoise = takes_noise<Rule> && !(!Store && has_terms<Rule>);
  if constexpr (Store && !kNoise) {  // noise is drawn by the tile
    if (launch.phase != kDirection && InPlace<Rule>{launch, row, start, n, stage, scalars}()) return;
    blocked = step_blocks<Rule>(launch, row, head, start, n, [&](int64_t count, float* gt, float* pt, float** s) {
      update<Rule, true>(count, gt, pt, s[0], s[1], s[2], s[3], nullptr, nullptr, stage, scalars);
    });
  }
  constexpr bool kTerms = !Store && has_terms<Rule>;
  alignas(64) float buffer[3 + Rule::state_count + kTerms + kNoise][kTile];
  std::conditional_t<kTerms && takes_largest<Rule>, Largest, SquareSum> param_sum, update_sum;
  for (int64_t done = blocked; done < n; done += kTile) {
    const int64_t offset = start + done;
    const int count = int(n - done < kTile ? n - done : kTile);
    float* gt = load_tile(row[kGrad], launch.grad_dtype, offset, count, buffer[0]);
    float* pt = load_param(launch, row, offset, count, buffer[1]);
    float* s[kMaxStates] = {};
    for (int i = 0; i < Rule::state_count; ++i) s[i] = load_state(launch, row, i, offset, count, buffer[3 + i]);
    if constexpr (kTerms) {
      float* second = buffer[3 + Rule::state_count];
      take_terms<Rule>(count, gt, pt, s[0], s[1], s[2], s[3], buffer[2], second, stage, scalars);
      param_sum.add_terms(buffer[2], count);
      update_sum.add_terms(second, count);
    } else {
      float* noise = nullptr;
      if constexpr (kNoise) draw_noise(row, head, offset, count, noise = buffer[3 + Rule::state_count]);
      update<Rule, Store>(count, gt, pt, s[0], s[1], s[2], s[3], noise, buffer[2], stage, scalars);
    }
    if constexpr (Store) {
      for (int i = 0; i < Rule::state_count; ++i) store_state(launch, row, head, i, offset, count, s[i]);
      store_param(launch, row, head, offset, count, pt);
    } else {
      if constexpr (!kTerms) {
        param_sum.add(pt, count);
        update_sum.add(buffer[2], count);
      }
      if ((offset + count) % kGrainSize == 0 || done + count == n) {
        float* partial = launch.partials + 2 * (row[kGrain] + offset / kGrainSize);
        partial[0] = param_sum.total();
        partial[1] = update_sum.total();
        param_sum = {};
        update_sum = {};
      }
    }
  }
}

// All phases but kNorm, which is reduce.cpp's.
template <class Rule>
static void step(const Launch& launch) {
  if (launch.found_inf && *launch.found_inf != 0.f) return;
  if (launch.phase == kProbe) {
    for_chunks(launch, step_chunk<Rule, false>);
    if constexpr (takes_largest<Rule>) finish_largest(launch);
    else finish_sums(launch);
  } else {
    for_chunks(launch, step_chunk<Rule, true>);
  }
}

}  // namespace fo

#define FO_INSTANTIATE(Type) \
  namespace fo { void step_##Type(const void* launch) { step<Type>(*static_cast<const Launch*>(launch)); } }
