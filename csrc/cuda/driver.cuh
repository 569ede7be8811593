// The multi-tensor step kernel: every tensor of a bucket in one launch, from gradients to parameters and states.
//
// Grid: one CTA of 8 warps per chunk (2K to 16K elements). Not persistent: a chunk keeps no state for the next one, the few hundred
// cycles of its table look-ups hide behind the other CTAs of the SM, and the hardware balances the end of the grid.
// A warp owns one block of 256 elements at a time, a lane one octet; the warp that owns a row's last block owns its tail.
// A chunk's look-ups meet at one barrier; its loop has none (but for the sums of a probe).
// Format, type and precision are warp-uniform switches: one kernel per rule. fp32 gets none of its own: its 20 instructions per element
// are a tenth of what its bytes leave time for, and with bf16 and int8 the switch is a few branches in about 600 instructions. A companion
// gets none either: it needs no more registers once no word of an octet is left undefined (access.cuh).
#pragma once
#include "../gauss.h"
#include "codec.cuh"
#include "reduce.cuh"
#include "weight.cuh"

namespace fo {

// What a chunk looks up only once: in shared memory, since in registers it would cost a CTA per SM.
template <class Rule>
struct Numbers {
  Head head;
  Stage stage;
  typename Rule::Scalars scalars;
  char *grad, *companion;     // from the chunk's first element on
  float* scales[kMaxStates];  // from its first block on
  uint64_t octet;             // of its first element
  PhiloxKeys keys;
  uint32_t tensor;
};

// Registers allow this many CTAs per SM; without it ptxas takes more registers and leaves less in flight.
template <class Rule>
constexpr int kMinBlocks = Rule::state_count <= 1 ? 4 : Rule::state_count == 2 ? 3 : 2;

// What the kernel switches on. bench/gates_cuda.py counts instructions with constants in place of it.
struct Mode {
  const Launch& launch;
  FO_DEV int format(int i) const { return launch.formats[i]; }
  FO_DEV int param_dtype() const { return launch.param_dtype; }
  FO_DEV int grad_dtype() const { return launch.grad_dtype; }
  FO_DEV int precision() const { return launch.precision; }
  FO_DEV bool is_full(int end, int whole) const { return end <= whole; }
};

template <class Rule, class AnyMode>
FO_DEV bool any_codes(const AnyMode& mode) {
  bool any = false;
#pragma unroll
  for (int i = 0; i < Rule::state_count; ++i) any |= is_blockwise(mode.format(i));
  return any;
}

template <class Rule, bool Probe, class AnyMode = Mode>
__global__ void __launch_bounds__(kThreads, kMinBlocks<Rule>) step_kernel(const __grid_constant__ Launch launch) {
  constexpr int kStates = Rule::state_count, kSlots = kStates > 0 ? kStates : 1;
  const AnyMode mode{launch};
  __shared__ CodeTables shared_tables;
  __shared__ BlockSums sums;
  __shared__ Numbers<Rule> numbers;
  // Every look-up that can be under way before the first one is used: they are the latency of a small launch.
  const float found_inf = launch.found_inf ? *launch.found_inf : 0.f;
  const Work work = make_work(launch);
  const Stream param = make_stream(entry(launch, kParam, work.row), dtype_shift(mode.param_dtype()), work.first);
  Stream states[kSlots];
#pragma unroll
  for (int i = 0; i < kStates; ++i)
    states[i] = make_stream(entry(launch, kState + i, work.row), format_shift(mode.format(i)), work.first);
  if (any_codes<Rule>(mode)) copy_code_tables(shared_tables);
  if (threadIdx.x == 0) {
    const float* row = launch.scalars + (work.meta & 0xFFFFFFFF) * kScalarStride;
    numbers.head = *reinterpret_cast<const Head*>(row);
    numbers.scalars = *reinterpret_cast<const typename Rule::Scalars*>(row + kScalarHead);
    numbers.stage = make_stage<Rule>(launch, launch.phase, numbers.head, numbers.scalars, work.meta >> 32);
    numbers.grad = make_stream(entry(launch, kGrad, work.row), dtype_shift(mode.grad_dtype()), work.first).base;
    if (has_companion(mode.precision()))
      numbers.companion = make_stream(entry(launch, kCompanion, work.row), companion_shift(mode.precision()), work.first).base;
    numbers.octet = uint64_t(work.first) / kOctet + uint64_t(entry(launch, kFirstOctet, work.row));
    numbers.tensor = uint32_t(work.meta >> 32);
    numbers.keys = philox_keys(numbers.head, numbers.tensor);
    for (int i = 0; i < kStates; ++i)
      numbers.scales[i] = reinterpret_cast<float*>(entry(launch, kScale + i, work.row)) + (work.first >> block_shift(mode.format(i)));
  }
  if (found_inf != 0.f) return;
  __syncthreads();
  const CodeView tables(shared_tables);

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  // A probe runs in step with the grains, so a warp without a block still adds its zero.
  const int end = Probe ? (work.count + kGrainSize - 1) / kGrainSize * kGrainSize : work.count;
  const bool reads_param = launch.phase != kDirection;
  const int whole = launch.aligned ? work.count : 0;  // elements that full blocks take
#pragma unroll 1
  for (int block = warp * kBlock; block < end; block += kGrainSize) {
    const int at = block + lane * kOctet, live = work.count - at;
    const bool full = mode.is_full(block + kBlock, whole);
    const Stream grad = {numbers.grad, dtype_shift(mode.grad_dtype())};
    const Stream companion = {numbers.companion, companion_shift(mode.precision())};
    Octet raw_g, raw_p = {}, raw_s[kSlots];
    if (full) {
      raw_g = load_octet(grad, at);
      if (reads_param) load_raw_weight<true>(raw_p, param, companion, mode.precision(), at, live);
#pragma unroll
      for (int i = 0; i < kStates; ++i) raw_s[i] = load_octet(states[i], at);
    } else {
      raw_g = load_octet_masked(grad, at, live);
      if (reads_param) load_raw_weight<false>(raw_p, param, companion, mode.precision(), at, live);
#pragma unroll
      for (int i = 0; i < kStates; ++i) raw_s[i] = load_octet_masked(states[i], at, live);
    }
    float scale[kSlots];
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      scale[i] = is_blockwise(mode.format(i)) && live > 0 ? __ldcs(numbers.scales[i] + (at >> block_shift(mode.format(i)))) : 0.f;

    float g[kOctet], p[kOctet], s[kMaxStates][kOctet];
    widen(g, raw_g, mode.grad_dtype());
    load_weight(p, raw_p, mode.param_dtype(), mode.precision());
#pragma unroll
    for (int i = 0; i < kStates; ++i) decode(s[i], raw_s[i], mode.format(i), scale[i], tables);

    const auto random = [&](int stream) {
      const uint64_t octet = stream_octet(numbers.octet + at / kOctet, stream);
      if constexpr (takes_noise<Rule>) return philox8(numbers.head, numbers.tensor, octet);  // its registers do not hold the keys
      else return philox8(numbers.keys, octet);
    };
    float z[kOctet] = {};
    if constexpr (takes_noise<Rule> && !(Probe && has_terms<Rule>)) {
      const Random8 drawn = random(kNoiseStream);
#pragma unroll
      for (int i = 0; i < kOctet; i += 2) {
        const Pair pair = normal_pair(uniform16(drawn, i), uniform16(drawn, i + 1));
        z[i] = pair.first, z[i + 1] = pair.second;
      }
    }
    constexpr bool kLargest = takes_largest<Rule>;
    Pair square = {nothing<kLargest, float>(), nothing<kLargest, float>()};
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if constexpr (Probe && has_terms<Rule>) {
        const Pair t = terms<Rule>(prologue<Rule>(g[i], p[i], numbers.stage), p[i], s[0][i], s[1][i], s[2][i], s[3][i], numbers.scalars);
        if (full || i < live) square = join<kLargest>(square, t);
        continue;
      }
      const float u = direction<Rule>(prologue<Rule>(g[i], p[i], numbers.stage), p[i], z[i], s[0][i], s[1][i], s[2][i], s[3][i], numbers.scalars);
      if (!Probe) {
        p[i] = epilogue(p[i], u, numbers.stage);
      } else if (full || i < live) {
        square.first = fmaf(p[i], p[i], square.first);
        square.second = fmaf(u, u, square.second);
      }
    }
    if (Probe) {
      const int grain = block / kGrainSize;
      square = warp_join<kLargest>(square);
      if (lane == 0) sums.block[grain % kPassGrains][warp] = square;
      const bool last = block + kGrainSize >= end;
      if (grain % kPassGrains == kPassGrains - 1 || last) store_grains<kLargest>(launch, work, sums, grain - grain % kPassGrains);
      continue;
    }

    Octet out, kept = {};
    out = store_weight(p, mode.param_dtype(), mode.precision(), random, kept);
    if (full) store_octet(param, at, out);
    else store_octet_masked(param, at, live, out);
    if (has_companion(mode.precision())) {
      if (full) store_octet(companion, at, kept);
      else store_octet_masked(companion, at, live, kept);
    }
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int format = mode.format(i);
      if (is_blockwise(format)) {
        if (!full) clear_tail(s[i], live);
        float next = 0.f;
        out = encode(s[i], format, next, tables);
        if (owns_scale(format, live)) __stcs(numbers.scales[i] + (at >> block_shift(format)), next);
      } else if ((format & kFormatMask) == kFormatBF16Stochastic) {
        out = narrow_stochastic(s[i], kBF16, random(1 + i));
      } else {
        out = narrow(s[i], format_dtype(format));
      }
      if (full) store_octet(states[i], at, out);
      else store_octet_masked(states[i], at, live, out);
    }
  }
  if (Probe) finish_row<false, takes_largest<Rule>>(launch, work);
}

template <class Rule>
const char* launch_step(const Launch& launch, void* stream) {
  if (launch.phase == kProbe) {
    if constexpr (probes<Rule>) FO_LAUNCH((step_kernel<Rule, true>), launch.n_chunks, kThreads, stream, launch);
    else return "only a rule with a trust ratio on its update, or with terms, has a probe";
  } else {
    FO_LAUNCH((step_kernel<Rule, false>), launch.n_chunks, kThreads, stream, launch);
  }
  return launch_error();
}

}  // namespace fo

#define FO_INSTANTIATE(Type) \
  const char* fo_cuda_##Type(const fo::Launch& launch, void* stream) { return fo::launch_step<fo::Type>(launch, stream); }
