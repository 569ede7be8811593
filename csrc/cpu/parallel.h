// The loop over a launch's chunks: threads, their share of the chunks, and the floating-point mode they work in.
#pragma once
#include "../fusedopt.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace fo {

// Subnormal operands cost about 100 cycles each. The mode belongs to a thread, so every worker sets it and puts it back.
class FlushSubnormals {
 public:
  FlushSubnormals() : saved_(read()) { write(saved_ | kFlush); }
  ~FlushSubnormals() { write(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__x86_64__) || defined(_M_X64)
  static constexpr uint64_t kFlush = 0x8040;  // FTZ | DAZ
  static uint64_t read() { return _mm_getcsr(); }
  static void write(uint64_t mode) { _mm_setcsr(unsigned(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t(1) << 24;  // FZ
  static uint64_t read() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void write(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t read() { return 0; }
  static void write(uint64_t) {}
#endif
  uint64_t saved_;
};

constexpr int64_t kSerialElements = 16384;  // less than this takes less time than waking the threads
constexpr int64_t kLargestShare = 16;       // chunks a thread takes at once: neighbours keep the prefetchers' streams long

// Calls body(launch, chunk) for every chunk; which thread runs a chunk has no influence on any result.
static inline void for_chunks(const Launch& launch, void (*body)(const Launch&, int64_t)) {
  const int64_t count = launch.n_chunks;
  if (launch.threads > 1 && count > 1 && count * launch.chunk > kSerialElements) {
    int64_t share = count / (launch.threads * 16);
    share = share < 1 ? 1 : share > kLargestShare ? kLargestShare : share;
#pragma omp parallel num_threads(launch.threads)
    {
      FlushSubnormals mode;
#pragma omp for schedule(dynamic, share)
      for (int64_t i = 0; i < count; ++i) body(launch, launch.chunks[i]);
    }
  } else {
    FlushSubnormals mode;
    for (int64_t i = 0; i < count; ++i) body(launch, launch.chunks[i]);
  }
}

// One row of the table, as a chunk sees it.
struct Row {
  const int64_t* column;  // entry of column 0; column c lies c * rows further
  int64_t rows;

  Row(const Launch& launch, int64_t row) : column(launch.table + row), rows(launch.rows) {}
  int64_t operator[](int c) const { return column[c * rows]; }
  int64_t tensor() const { return (*this)[kMeta] >> 32; }
  int64_t scalar_row() const { return (*this)[kMeta] & 0xFFFFFFFF; }
};

}  // namespace fo
