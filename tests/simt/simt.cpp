// The scheduler of simt.h, and the C entry points that tests call: describe, launch, encode, decode, sums, order.
#define FO_DISPATCH
#include "simt.h"
#include "cuda/dispatch.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <sys/mman.h>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

Index thread_index, block_index;

namespace {

constexpr size_t kStack = 64 << 10;

#if defined(__x86_64__)
// Pushes the callee-saved registers, stores the stack pointer, takes another one and pops them again: no system call.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");

struct Context {
  void* stack_pointer;
  void start(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStack - 64);  // entry sees rsp = 8 mod 16, as after a call
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer = top - 6;
  }
  void switch_to(Context& other) { simt_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;
  void start(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

enum class State { ready, at_exchange, at_barrier, done };

struct Fiber {
  Context context;
  State state;
  Op op;
  uint64_t value;
};

struct Warp { uint64_t values[kWarp]; };

std::vector<Fiber> fibers;
std::vector<Warp> warps;
char* stacks = nullptr;
size_t stack_bytes = 0;
Context scheduler;
int current = 0;
const std::function<void()>* body = nullptr;
std::string failure;
uint64_t order_seed = 0;

void yield(State state) {
  fibers[current].state = state;
  fibers[current].context.switch_to(scheduler);
}

void entry() {
  (*body)();
  yield(State::done);
  std::abort();
}

void resume(int thread) {
  current = thread;
  thread_index = {unsigned(thread), 0, 0};
  scheduler.switch_to(fibers[thread].context);
}

// Runs the lanes of a warp until all wait at the block barrier or are done; false on an error.
bool run_warp(int warp) {
  Fiber* lanes = &fibers[size_t(warp) * kWarp];
  for (;;) {
    for (int i = 0; i < kWarp; ++i)
      if (lanes[i].state == State::ready) {
        resume(warp * kWarp + i);
        if (!failure.empty()) return false;
      }
    for (int i = 1; i < kWarp; ++i) {
      if (lanes[i].state != lanes[0].state) return failure = "the lanes of a warp diverge at a collective or a barrier", false;
      if (lanes[0].state == State::at_exchange && lanes[i].op != lanes[0].op) return failure = "the lanes of a warp wait at different collectives", false;
    }
    if (lanes[0].state != State::at_exchange) return true;
    for (int i = 0; i < kWarp; ++i) {
      warps[warp].values[i] = lanes[i].value;
      lanes[i].state = State::ready;
    }
  }
}

bool run_block(int threads) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks, stack_bytes);
#endif
  for (int i = 0; i < threads; ++i) {
    fibers[i].state = State::ready;
    fibers[i].context.start(stacks + kStack * i, entry);
  }
  const int count = threads / kWarp;
  for (;;) {
    for (int w = 0; w < count; ++w)
      if (!run_warp(w)) return false;
    State first = fibers[0].state;
    for (int w = 1; w < count; ++w)
      if (fibers[w * kWarp].state != first) return failure = "some warps wait at a block barrier that others have left", false;
    if (first == State::done) return true;
    for (int i = 0; i < threads; ++i) fibers[i].state = State::ready;
  }
}

}  // namespace

int lane() { return current % kWarp; }

const uint64_t* exchange(Op op, uint64_t value) {
  fibers[current].op = op;
  fibers[current].value = value;
  yield(State::at_exchange);
  return warps[current / kWarp].values;
}

void barrier() { yield(State::at_barrier); }

void fail(const char* what) {
  failure = what;
  yield(State::done);
  std::abort();
}

const char* error() { return failure.empty() ? nullptr : failure.c_str(); }
void set_order(uint64_t seed) { order_seed = seed; }

void run(int64_t grid, int block, const std::function<void()>& kernel) {
  failure.clear();
  if (grid <= 0 || block % kWarp) {
    failure = "invalid configuration";
    return;
  }
  if (stack_bytes < kStack * block) {
    if (stacks) munmap(stacks, stack_bytes);
    stack_bytes = kStack * block;
    stacks = static_cast<char*>(mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  }
  fibers.resize(block);
  warps.resize(block / kWarp);
  body = &kernel;
  std::vector<int64_t> order(grid);
  std::iota(order.begin(), order.end(), 0);
  if (order_seed) std::shuffle(order.begin(), order.end(), std::mt19937_64(order_seed));
  for (int64_t index : order) {
    block_index = {unsigned(index), 0, 0};
    if (!run_block(block)) return;
  }
}

}  // namespace simt

extern "C" {

// "name;states;scalars;trust_on" per line.
const char* fo_simt_describe() {
  static const std::string text = [] {
    std::string all;
    for (const fo::RuleInfo& r : fo::kRules)
      all += std::string(r.name) + ";" + r.states + ";" + r.scalars + ";" + std::to_string(r.trust_on) + "\n";
    return all;
  }();
  return text.c_str();
}

int fo_simt_launch_bytes() { return int(sizeof(fo::Launch)); }
void fo_simt_order(uint64_t seed) { simt::set_order(seed); }

const char* fo_simt_launch(const void* packed) {
  fo::Launch launch;
  std::memcpy(&launch, packed, sizeof launch);
  return fo::cuda_launch(launch, nullptr);
}

const char* fo_simt_encode(int64_t values, int dtype, int64_t numel, int format, int64_t codes, int64_t scales) {
  return fo_cuda_encode(values, dtype, numel, format, codes, scales, nullptr);
}

const char* fo_simt_decode(int64_t codes, int64_t scales, int64_t numel, int format, int64_t values, int dtype) {
  return fo_cuda_decode(codes, scales, numel, format, values, dtype, nullptr);
}

int64_t fo_simt_sums_scratch(int64_t rows, int64_t cols) { return fo_cuda_sums_scratch(rows, cols); }

const char* fo_simt_row_col_sums(int64_t grad, int dtype, int64_t rows, int64_t cols, int64_t mul, int64_t row_out, int64_t col_out,
                                 int64_t scratch) {
  return fo_cuda_row_col_sums(grad, dtype, rows, cols, mul, row_out, col_out, scratch, nullptr);
}

const char* fo_simt_weighted_square_sum(int64_t grad, int dtype, int64_t rows, int64_t cols, int64_t row_weight, int64_t col_weight,
                                        int64_t out, int64_t scratch) {
  return fo_cuda_weighted_square_sum(grad, dtype, rows, cols, row_weight, col_weight, out, scratch, nullptr);
}

}
