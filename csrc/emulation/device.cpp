// The emulated device, and what tests tell it.

#include "device.h"

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
