// An emulated CUDA device: kernels are compiled for the host, and the threads of a block are fibers that take turns. The tests
// run the kernels this way on machines without a GPU; it is no way to run a model.
//
// A fiber runs until it waits for others, at a barrier of its block or in an exchange (shuffle) of its warp. Which of the
// waiting fibers runs next is the schedule. A seed decides it: each block draws an order of its fibers, warp by warp, so that
// some warps run far ahead of others, as on a device. A missing barrier then gives wrong numbers under some seed, and always
// under that seed.
//
// Errors that it finds: a barrier that some threads never reach; threads of one warp in different exchanges; shared memory that
// is read before it is written (it begins as NaN in every format); and, under AddressSanitizer, accesses outside shared memory,
// which each block gets anew and of the exact size.
//
// What it lacks: time, atomics, PTX, and the reordering of memory accesses within a thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define ALIGNED(p, bytes) (emulation::aligned(p, bytes))
#define SHARED_MEMORY (emulation::block().shared.get())
#define threadIdx (emulation::block().thread())
#define blockIdx (emulation::block().index)
#define blockDim (emulation::block().size)
#define gridDim (emulation::block().grid)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

namespace shardcomp::emulation {

struct Index {
  unsigned x, y;
};

#if defined(__x86_64__)
// Saves the caller's stack pointer in `from` and continues at `to`; in device.cpp. swapcontext of the C library makes two
// system calls for each switch.
extern "C" __attribute__((visibility("hidden"))) void shardcomp_switch_fiber(void** from, void* to);

struct Context {
  void* top = nullptr;  // of its stack, where the saved registers are

  void begin(void (*function)(), char* stack, size_t bytes) {
    void** end = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) / 16 * 16);
    *--end = nullptr;  // the return address of `function`, which never returns
    *--end = reinterpret_cast<void*>(function);
    for (int i = 0; i < 6; ++i) *--end = nullptr;
    top = end;
  }
  void leave_for(Context& to) { shardcomp_switch_fiber(&top, to.top); }
};
#else
struct Context {
  ucontext_t saved;

  void begin(void (*function)(), char* stack, size_t bytes) {
    getcontext(&saved);
    saved.uc_stack.ss_sp = stack;
    saved.uc_stack.ss_size = bytes;
    saved.uc_link = nullptr;
    makecontext(&saved, function, 0);
  }
  void leave_for(Context& to) { swapcontext(&saved, &to.saved); }
};
#endif

struct Fiber {
  Context context;
  Index index;
  std::vector<uint64_t> sent;  // to others of the warp, in the last two exchanges: a fast fiber may be one exchange ahead
  int exchanges = 0;
  // Asynchronous copies by group; they happen at the wait, as late as a device may make them.
  std::vector<std::vector<std::pair<uint4*, const void*>>> groups;
  bool ended = false;
  uint64_t order = 0;
};

// A barrier of a warp or of a block, and the fibers that wait at it.
struct Barrier {
  int members, first;
  std::vector<int> waiting;
};

constexpr size_t stack_bytes = 48 << 10;

class Block {
 public:
  Index index{}, size{}, grid{};
  std::unique_ptr<unsigned char[]> shared;

  Index thread() const { return fibers_[at_].index; }

  void run(int64_t blocks, int x, int y, int64_t bytes, const std::function<void()>& body) {
    size = {unsigned(x), unsigned(y)};
    grid = {unsigned(blocks), 1};
    body_ = &body;
    const int count = x * y;
    if (count % 32 != 0 || count > 1024) throw std::runtime_error("emulation: a block is of whole warps, at most 32");
    fibers_.resize(count);
    if (stacks_.size() < count * stack_bytes) stacks_ = std::vector<char>(count * stack_bytes);
    for (int64_t number = 0; number < blocks; ++number) {
      index = {unsigned(number), 0};
      shared.reset(new unsigned char[bytes]);
      memset(shared.get(), 0xff, bytes);
      one(count);
      if (!failure_.empty()) {
        const std::string text = std::move(failure_);
        failure_.clear();
        throw std::runtime_error("emulation: " + text);
      }
    }
  }

  void wait_block() { wait(barriers_.back()); }

  int lane() const { return at_ % 32; }

  // Sends a value to the warp and returns the value that lane `lane` sends in the same exchange.
  uint64_t exchanged(uint64_t sent, int lane) {
    Fiber& self = fibers_[at_];
    const int other = at_ / 32 * 32 + lane, which = self.exchanges++ % 2, number = self.exchanges;
    self.sent[which] = sent;
    wait(barriers_[at_ / 32]);
    const Fiber& from = fibers_[other];
    // The other fiber may already be in the next exchange, where it waits for this one.
    if (from.exchanges != number && from.exchanges != number + 1) fail("the threads of a warp exchange in different numbers");
    return from.sent[which];
  }

  void copy(uint4* to, const void* from) {
    Fiber& self = fibers_[at_];
    if (self.groups.empty()) self.groups.emplace_back();
    self.groups.back().emplace_back(to, from);
  }
  void end_group() {
    Fiber& self = fibers_[at_];
    if (self.groups.empty()) self.groups.emplace_back();
    self.groups.emplace_back();
  }
  // Makes the copies of all groups but the last few. The last entry is the group that has not ended.
  void await_groups(int but) {
    auto& groups = fibers_[at_].groups;
    while (int(groups.size()) > but + 1) {
      for (auto& [to, from] : groups.front()) *to = from == nullptr ? uint4{} : *static_cast<const uint4*>(from);
      groups.erase(groups.begin());
    }
  }

  void seed(uint64_t seed) { state_ = seed; }

 private:
  void one(int count) {
    ready_.clear();
    barriers_.clear();
    for (int first = 0; first < count; first += 32) barriers_.push_back({32, first, {}});
    barriers_.push_back({count, 0, {}});
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.index = {unsigned(i) % size.x, unsigned(i) / size.x};
      fiber.sent.assign(2, ~uint64_t(0));
      fiber.exchanges = 0;
      fiber.groups.clear();
      fiber.ended = false;
      if (state_ != 0) fiber.order = i % 32 == 0 ? uint64_t(random()) << 32 : (fibers_[i - 1].order >> 32 << 32) + random();
#if defined(__SANITIZE_ADDRESS__)
      ASAN_UNPOISON_MEMORY_REGION(&stacks_[i * stack_bytes], stack_bytes);  // that of a fiber that ended inside a call
#endif
      fiber.context.begin(&Block::begin, &stacks_[i * stack_bytes], stack_bytes);
      ready(i);
    }
    at_ = next();
    enter(at_);
    left_main();
    for (int i = 0; i < count && failure_.empty(); ++i) {
      if (!fibers_[i].ended) failure_ = "threads wait for others that have ended";
    }
  }

  static void begin();

  uint32_t random() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state_ >> 33);
  }

  // The next fiber to run: the first in the order, or without a seed the first that became ready.
  int next() {
    if (state_ != 0) std::pop_heap(ready_.begin(), ready_.end(), Later{fibers_});
    const int fiber = state_ != 0 ? ready_.back() : ready_.front();
    ready_.erase(state_ != 0 ? ready_.end() - 1 : ready_.begin());
    return fiber;
  }

  // Makes a fiber ready. One in eight times it gets another place in the order, so that no warp stays ahead for good.
  void ready(int at) {
    ready_.push_back(at);
    if (state_ == 0) return;
    if (random() % 8 == 0) fibers_[at].order = uint64_t(random()) << 32;
    std::push_heap(ready_.begin(), ready_.end(), Later{fibers_});
  }

  struct Later {
    const std::vector<Fiber>& fibers;
    bool operator()(int a, int b) const { return fibers[a].order > fibers[b].order; }
  };

  void wait(Barrier& barrier) {
    barrier.waiting.push_back(at_);
    if (int(barrier.waiting.size()) == barrier.members) {
      for (int waiting : barrier.waiting) ready(waiting);
      barrier.waiting.clear();
    }
    leave(false);
  }

  void fail(const char* text) {
    failure_ = text;
    leave(true);
  }

  // Switches from one fiber to the next, or out of the block if none is ready.
  void leave(bool for_good) {
    const int from = at_;
    void* fake_stack = nullptr;
    if (ready_.empty() || !failure_.empty()) {
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, main_bottom_, main_size_);
#endif
      fibers_[from].context.leave_for(main_);
    } else {
      at_ = next();
      if (at_ == from) return;
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, &stacks_[at_ * stack_bytes], stack_bytes);
#endif
      fibers_[from].context.leave_for(fibers_[at_].context);
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    (void)fake_stack;
    (void)for_good;
  }

  void enter(int to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&main_fake_, &stacks_[to * stack_bytes], stack_bytes);
#endif
    main_.leave_for(fibers_[to].context);
  }

  void left_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(main_fake_, nullptr, nullptr);
#endif
  }

  std::vector<Fiber> fibers_;
  std::vector<char> stacks_;
  std::vector<int> ready_;
  std::vector<Barrier> barriers_;
  const std::function<void()>* body_ = nullptr;
  std::string failure_;
  Context main_;
  const void* main_bottom_ = nullptr;
  size_t main_size_ = 0;
  void* main_fake_ = nullptr;
  uint64_t state_ = 0;
  int at_ = 0;
};

// The block that this thread of the host runs, one for all sources.
Block& block();

// A device faults on an access that is not aligned to its size; here the process ends.
template <class P>
P* aligned(P* p, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fprintf(stderr, "emulation: what is moved at once is not aligned\n");
    abort();
  }
  return p;
}

// The size of the device; `shared` is for each block.
struct Facts {
  int multiprocessors = 3;
  int64_t shared = 12 << 10;  // little, so that the tests also have rows that do not fit
};
Facts& facts();

inline void Block::begin() {
  Block& self = block();
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (self.main_bottom_ == nullptr) self.main_bottom_ = bottom, self.main_size_ = size;
#endif
  (*self.body_)();
  self.fibers_[self.at_].ended = true;
  self.leave(true);
}

inline void run(int64_t blocks, int x, int y, int64_t shared, const std::function<void()>& body) {
  block().run(blocks, x, y, shared, body);
}

}  // namespace shardcomp::emulation

inline void __syncthreads() { shardcomp::emulation::block().wait_block(); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shardcomp::emulation::block().exchanged(bits, lane);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned all, T value, int distance) {
  return __shfl_sync(all, value, shardcomp::emulation::block().lane() ^ distance);
}

inline float __uint_as_float(uint32_t bits) {
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t result;
  memcpy(&result, &x, sizeof(result));
  return result;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
