// What the CUDA sources need from their platform: nvcc's runtime, or the host shim that runs the same sources on a CPU (FO_SIMT).
#pragma once
#if defined(FO_SIMT)
#include "simt.h"
#else
#include <cuda_runtime.h>
#define FO_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

#define FO_DEV __device__ __forceinline__

namespace fo {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kWarps = 8;              // warps of a CTA: 8 blocks of 256 elements are one grain
constexpr int kThreads = 32 * kWarps;

inline const char* launch_error() {  // null: the launch was accepted
#if defined(FO_SIMT)
  return simt::error();
#else
  cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
#endif
}

}  // namespace fo
