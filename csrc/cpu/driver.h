// The multi-tensor step on a CPU: for every chunk of the launch decode, rule, encode. Compiled once per rule and instruction set.
//
// fp32 streams are stepped where they lie; the others go through buffers of one tile, so every rule has one vectorised loop.
// Each element belongs to exactly one chunk; the last chunk of a row and its last tile are short.
#pragma once
#include "../stages.h"
#include "parallel.h"
#include "reduce.h"
#include "tile.h"

namespace fo {

// Steps n elements in fp32. Without Store it writes the update to `u` and nothing else. Unused states are null.
template <class Rule, bool Store>
static __attribute__((noinline)) void update(int64_t n, const float* __restrict g, float* __restrict p, float* __restrict state0,
                                             float* __restrict state1, float* __restrict state2, float* __restrict state3,
                                             float* __restrict u, const Stage s, const typename Rule::Scalars scalars) {
  constexpr int states = Rule::state_count;
  for (int64_t i = 0; i < n; ++i) {
    float x = p[i], a = 0.f, b = 0.f, c = 0.f, d = 0.f;
    if constexpr (states > 0) a = state0[i];
    if constexpr (states > 1) b = state1[i];
    if constexpr (states > 2) c = state2[i];
    if constexpr (states > 3) d = state3[i];
    float direct = direction<Rule>(prologue(g[i], x, s), x, a, b, c, d, scalars);
    if constexpr (Store) {
      if constexpr (states > 0) state0[i] = a;
      if constexpr (states > 1) state1[i] = b;
      if constexpr (states > 2) state2[i] = c;
      if constexpr (states > 3) state3[i] = d;
      p[i] = epilogue(x, direct, s);
    } else {
      u[i] = direct;
    }
  }
}

template <class Rule>
static bool in_place(const Launch& launch) {
  bool fp32 = launch.param_dtype == kF32 && launch.grad_dtype == kF32;
  for (int i = 0; i < Rule::state_count; ++i) fp32 &= (launch.formats[i] & kFormatMask) == kFormatF32;
  return fp32;
}

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

  const int64_t g = row[kGrad], p = row[kParam];
  if (Store && in_place<Rule>(launch)) {
    auto at = [&](int64_t address) { return reinterpret_cast<float*>(address) + start; };
    float* s[kMaxStates] = {};
    for (int i = 0; i < Rule::state_count; ++i) s[i] = at(row[kState + i]);
    update<Rule, true>(n, at(g), at(p), s[0], s[1], s[2], s[3], nullptr, stage, scalars);
    return;
  }

  alignas(64) float buffer[3 + Rule::state_count][kTile];
  SquareSum param_sum, update_sum;
  for (int64_t done = 0; done < n; done += kTile) {
    const int64_t offset = start + done;
    const int count = int(n - done < kTile ? n - done : kTile);
    float* gt = load_tile(g, launch.grad_dtype, offset, count, buffer[0]);
    float* pt = load_tile(p, launch.param_dtype, offset, count, buffer[1]);
    float* s[kMaxStates] = {};
    for (int i = 0; i < Rule::state_count; ++i) {
      s[i] = load_state(row[kState + i], row[kScale + i], launch.formats[i], offset, count, buffer[3 + i]);
    }
    update<Rule, Store>(count, gt, pt, s[0], s[1], s[2], s[3], buffer[2], stage, scalars);
    if constexpr (Store) {
      for (int i = 0; i < Rule::state_count; ++i) {
        store_state(row[kState + i], row[kScale + i], launch.formats[i], offset, count, s[i]);
      }
      store_param(p, launch, head, uint32_t(tensor), offset, count, pt);
    } else {
      param_sum.add(pt, count);
      update_sum.add(buffer[2], count);
      if ((offset + count) % kGrainSize == 0 || done + count == n) {
        float* partial = launch.partials + 2 * (row[kGrain] + offset / kGrainSize);
        partial[0] = param_sum.total();
        partial[1] = update_sum.total();
        param_sum = update_sum = {};
      }
    }
  }
}

// kFused, kProbe and kApply; kNorm is reduce.cpp's.
template <class Rule>
static void step(const Launch& launch) {
  if (launch.found_inf && *launch.found_inf != 0.f) return;
  if (launch.phase == kProbe) {
    for_chunks(launch, step_chunk<Rule, false>);
    finish_sums(launch);
  } else {
    for_chunks(launch, step_chunk<Rule, true>);
  }
}

}  // namespace fo

#define FO_INSTANTIATE(Type) \
  namespace fo { void step_##Type(const void* launch) { step<Type>(*static_cast<const Launch*>(launch)); } }
