// Deterministic sums (or maxima, for rules that take those) without float atomics: block -> grain (2048 elements) -> row -> launch, each in a fixed order.
// Grains do not depend on the chunk size, and who sums does not matter: the last CTA of a row adds the row's grains in order.
#pragma once
#include "../stages.h"
#include "platform.cuh"

namespace fo {

constexpr int kBlocksPerGrain = kGrainSize / kBlock;
static_assert(kBlocksPerGrain == kWarps, "one block of a grain per warp");

// What a CTA works on: one chunk of one row.
struct Work {
  int64_t row, first;   // first element in the row
  int64_t numel, meta;  // of the row
  int32_t count;        // elements of the chunk
};

FO_DEV int64_t entry(const Launch& launch, int column, int64_t row) { return launch.table[column * launch.rows + row]; }

FO_DEV Work make_work(const Launch& launch) {
  int64_t chunk = launch.chunks[blockIdx.x];
  Work w;
  w.row = chunk >> 32;
  w.first = (chunk & 0xFFFFFFFF) * launch.chunk;
  w.numel = entry(launch, kNumel, w.row);
  w.meta = entry(launch, kMeta, w.row);
  int64_t left = w.numel - w.first;
  w.count = int32_t(left < launch.chunk ? left : launch.chunk);
  return w;
}

template <bool Largest>
FO_DEV Pair warp_join(Pair x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const Pair other = {__shfl_xor_sync(kAllLanes, x.first, distance), __shfl_xor_sync(kAllLanes, x.second, distance)};
    x = join<Largest>(x, other);
  }
  return x;
}

constexpr int kPassGrains = 8;  // grains summed between two barriers: a chunk of the largest size plan uses
struct BlockSums { Pair block[kPassGrains][kBlocksPerGrain]; };

// All threads: one thread per grain joins its 8 blocks in order. `grain` counts from the chunk's first.
template <bool Largest>
FO_DEV void store_grains(const Launch& launch, const Work& work, BlockSums& sums, int grain) {
  __syncthreads();
  int mine = grain + int(threadIdx.x);
  if (threadIdx.x < kPassGrains && mine * kGrainSize < work.count) {
    Pair s = sums.block[threadIdx.x][0];
    for (int i = 1; i < kBlocksPerGrain; ++i) s = join<Largest>(s, sums.block[threadIdx.x][i]);
    float* out = launch.partials + 2 * (entry(launch, kGrain, work.row) + work.first / kGrainSize + mine);
    out[0] = s.first;
    out[1] = s.second;
    __threadfence();
  }
  __syncthreads();
}

struct Total { double first[kThreads], second[kThreads]; };

template <bool Largest>
FO_DEV void join_threads(Total& total) {  // into entry 0
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) {
      total.first[threadIdx.x] = join<Largest>(total.first[threadIdx.x], total.first[threadIdx.x + half]);
      total.second[threadIdx.x] = join<Largest>(total.second[threadIdx.x], total.second[threadIdx.x + half]);
    }
  }
}

// Thread 0 of the launch's last CTA: the launch's total; the last launch adds all totals and derives the norm and the clip coefficient.
FO_DEV void store_norm(const Launch& launch, double total) {
  launch.totals[launch.total_index] = float(total);
  if (launch.total_index != launch.total_count - 1) return;
  double all = 0;
  for (int i = 0; i < launch.total_count; ++i) all += double(launch.totals[i]);
  float norm = float(::sqrt(all));
  if (launch.grad_scale) norm = div(norm, *launch.grad_scale);
  *launch.norm = norm;
  if (launch.max_norm > 0.f) *launch.clip = clip_coefficient(norm, launch.max_norm);
}

// All threads, after the partials of the chunk are stored. Counts finished chunks; the last CTA of a row stores the row's sums,
// and, for kNorm, the last CTA of the launch its total. Empty rows have no chunk and are passed over.
template <bool IsNorm, bool Largest>
FO_DEV void finish_row(const Launch& launch, const Work& work) {
  __shared__ Total total;
  __shared__ bool last;
  const int64_t chunks = (work.numel + launch.chunk - 1) / launch.chunk;
  if (threadIdx.x == 0) last = atomicAdd(&launch.counters[work.row], 1) == int(chunks) - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  float* partials = launch.partials + 2 * entry(launch, kGrain, work.row);
  const int64_t grains = (work.numel + kGrainSize - 1) / kGrainSize;
  double first = nothing<Largest, double>(), second = first;
  for (int64_t i = threadIdx.x; i < grains; i += kThreads) {
    first = join<Largest>(first, double(__ldcg(partials + 2 * i)));
    second = join<Largest>(second, double(__ldcg(partials + 2 * i + 1)));
  }
  total.first[threadIdx.x] = first;
  total.second[threadIdx.x] = second;
  join_threads<Largest>(total);
  __syncthreads();
  if (threadIdx.x == 0) {
    launch.counters[work.row] = 0;
    if (launch.sums) {
      float* sums = launch.sums + 2 * (work.meta >> 32);
      sums[0] = float(total.first[0]);
      sums[1] = float(total.second[0]);
    }
    if (IsNorm) {
      partials[1] = float(total.second[0]);  // read above by all: now the row's total
      __threadfence();
      int done = atomicAdd(&launch.counters[launch.rows], int(chunks));
      last = done + chunks == launch.n_chunks;
    }
  }
  if (!IsNorm) return;
  __syncthreads();
  if (!last) return;
  __threadfence();
  second = 0;
  for (int64_t row = threadIdx.x; row < launch.rows; row += kThreads)
    if (entry(launch, kNumel, row) > 0) second += double(__ldcg(launch.partials + 2 * entry(launch, kGrain, row) + 1));
  __syncthreads();
  total.first[threadIdx.x] = 0;
  total.second[threadIdx.x] = second;
  join_threads<false>(total);
  if (threadIdx.x == 0) {
    launch.counters[launch.rows] = 0;
    store_norm(launch, total.second[0]);
  }
}

}  // namespace fo
