// Runs CUDA sources on the CPU, one fiber per thread: what csrc/cuda uses of the CUDA language, for tests on machines without a GPU.
//
// Blocks run one after the other (in an order that a seed permutes), the lanes of a warp in turn until each waits at a collective.
// Divergence at a warp collective or a block barrier is an error, not a hang. Races between warps stay invisible.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks are serial: one copy is enough
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define FO_LAUNCH(kernel, grid, block, stream, ...) simt::run(grid, block, [&] { kernel(__VA_ARGS__); })

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace simt {

constexpr int kWarp = 32;
struct Index { unsigned x, y, z; };
extern Index thread_index, block_index;

// Runs the grid to its end or to the first error.
void run(int64_t grid, int block, const std::function<void()>& kernel);
const char* error();  // of the last run; null: none
void set_order(uint64_t seed);  // 0: ascending

// Waits for the warp, then returns the values that its 32 lanes gave.
enum class Op { shuffle_xor, reduce_max, sync };
const uint64_t* exchange(Op op, uint64_t value);
void barrier();
[[noreturn]] void fail(const char* what);
int lane();

template <class T>
T checked(const T* at) {  // the alignment a GPU insists on
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T)) fail("misaligned load");
  return *at;
}

template <class T>
void checked(T* at, T value) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T)) fail("misaligned store");
  *at = value;
}

}  // namespace simt

#define threadIdx simt::thread_index
#define blockIdx simt::block_index

template <class T> T __ldcs(const T* at) { return simt::checked(at); }
template <class T> T __ldcg(const T* at) { return simt::checked(at); }
template <class T> void __stcs(T* at, T value) { simt::checked(at, value); }

inline void __syncthreads() { simt::barrier(); }
inline void __threadfence() {}

inline int atomicAdd(int* at, int value) {
  int before = *at;
  *at += value;
  return before;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  if (mask != 0xFFFFFFFFu) simt::fail("a shuffle of part of a warp");
  uint64_t in = 0;
  std::memcpy(&in, &value, sizeof value);
  std::memcpy(&value, simt::exchange(simt::Op::shuffle_xor, in) + (simt::lane() ^ distance), sizeof value);
  return value;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  if (mask != 0xFFFFFFFFu) simt::fail("a reduction of part of a warp");
  const uint64_t* all = simt::exchange(simt::Op::reduce_max, value);
  uint64_t largest = 0;
  for (int i = 0; i < simt::kWarp; ++i) largest = all[i] > largest ? all[i] : largest;
  return unsigned(largest);
}
