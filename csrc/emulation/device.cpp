// The emulated device, and what tests tell it.

#include "device.h"

#if defined(__x86_64__)
asm(R"(
  .text
  .hidden shardcomp_go_on
  .globl shardcomp_go_on
  .type shardcomp_go_on, @function
shardcomp_go_on:
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
  .size shardcomp_go_on, .-shardcomp_go_on
)");
#endif

namespace shardcomp::emulation {

Block& block() {
  static thread_local Block held;
  return held;
}

Facts& facts() {
  static Facts held;
  return held;
}

}  // namespace shardcomp::emulation

// The schedule of all blocks from now on; 0 is the one in order.
extern "C" __attribute__((visibility("default"))) void shardcomp_seed(uint64_t seed) { shardcomp::emulation::block().seed(seed); }
extern "C" __attribute__((visibility("default"))) void shardcomp_device(int multiprocessors, int64_t shared) {
  shardcomp::emulation::facts() = {multiprocessors, shared};
}
