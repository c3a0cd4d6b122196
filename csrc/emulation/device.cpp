// The emulated device: the switch between fibers, and the functions that tests call.

#include "device.h"

// Saves the registers that a call must preserve and the stack pointer, then restores those of the other fiber. Nothing else: a
// test makes millions of switches.
#if defined(__x86_64__)
asm(R"(
  .text
  .hidden shardcomp_switch_fiber
  .globl shardcomp_switch_fiber
  .type shardcomp_switch_fiber, @function
shardcomp_switch_fiber:
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
  .size shardcomp_switch_fiber, .-shardcomp_switch_fiber
)");
#endif

namespace shardcomp::emulation {

Block& block() {
  static thread_local Block running;
  return running;
}

Facts& facts() {
  static Facts device;
  return device;
}

}  // namespace shardcomp::emulation

// Sets the seed of the schedules from now on; 0 runs threads in order.
extern "C" __attribute__((visibility("default"))) void shardcomp_seed(uint64_t seed) { shardcomp::emulation::block().seed(seed); }
// Sets the size of the device, and with it which launch a kernel chooses.
extern "C" __attribute__((visibility("default"))) void shardcomp_device(int multiprocessors, int64_t shared) {
  shardcomp::emulation::facts() = {multiprocessors, shared};
}
