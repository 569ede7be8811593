// Phase kNorm: |g|^2 (g as stored) and, where sums are wanted, |p|^2 of each tensor; the global gradient norm. Reads only.
// Grid: one CTA of 8 warps per chunk; warp w owns block w of each grain; whoever owns the tail adds zeros for what is missing.
#include "access.cuh"
#include "dispatch.h"
#include "reduce.cuh"

namespace fo {

FO_DEV float sum_squares(const Octet& o, int dtype) {
  float v[kOctet];
  widen(v, o, dtype);
  float s = 0;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) s = fmaf(v[i], v[i], s);
  return s;
}

// Blocks whose loads are issued together: 4 fp32 octets take 32 registers and give 4 KB in flight per warp.
constexpr int kBatch = 4;

// Into member `which` of sums: this warp's block of each grain in [grain, grain + kPassGrains).
template <int Dtype>
FO_DEV void block_squares(const Launch& launch, const Work& work, int64_t address, int grain, float Pair::*which, BlockSums& sums) {
  const Stream stream = make_stream(address, dtype_shift(Dtype), work.first);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int first = grain * kGrainSize + warp * kBlock + lane * kOctet;
#pragma unroll 1
  for (int pass = 0; pass < kPassGrains; pass += kBatch) {
    float s[kBatch];
    if (launch.aligned && (grain + pass + kBatch) * kGrainSize <= work.count) {
      Octet o[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) o[i] = load_octet(stream, first + (pass + i) * kGrainSize);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) s[i] = sum_squares(o[i], Dtype);
    } else {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = first + (pass + i) * kGrainSize, live = work.count - at;
        s[i] = sum_squares(launch.aligned && live >= kOctet ? load_octet(stream, at) : load_octet_masked(stream, at, live), Dtype);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      for (int distance = 16; distance > 0; distance /= 2) s[i] += __shfl_xor_sync(kAllLanes, s[i], distance);
      if (lane == 0) sums.block[pass + i][warp].*which = s[i];
    }
  }
}

FO_DEV void block_squares(const Launch& launch, const Work& work, int column, int dtype, int grain, float Pair::*which, BlockSums& sums) {
  const int64_t address = entry(launch, column, work.row);
  if (dtype == kF32) block_squares<kF32>(launch, work, address, grain, which, sums);
  else if (dtype == kBF16) block_squares<kBF16>(launch, work, address, grain, which, sums);
  else block_squares<kF16>(launch, work, address, grain, which, sums);
}

__global__ void __launch_bounds__(kThreads, 3) norm_kernel(const __grid_constant__ Launch launch) {
  __shared__ BlockSums sums;
  if (launch.n_chunks == 0) {  // every row is empty: the launch still has its entry in the totals
    if (threadIdx.x == 0) store_norm(launch, 0);
    return;
  }
  const Work work = make_work(launch);
  for (int grain = 0; grain * kGrainSize < work.count; grain += kPassGrains) {
    block_squares(launch, work, kGrad, launch.grad_dtype, grain, &Pair::second, sums);
    if (launch.sums) block_squares(launch, work, kParam, launch.param_dtype, grain, &Pair::first, sums);
    store_grains<false>(launch, work, sums, grain);
  }
  finish_row<true, false>(launch, work);
}

}  // namespace fo

const char* fo_cuda_norm(const fo::Launch& launch, void* stream) {
  FO_LAUNCH(fo::norm_kernel, launch.n_chunks > 0 ? launch.n_chunks : 1, fo::kThreads, stream, launch);
  return fo::launch_error();
}
