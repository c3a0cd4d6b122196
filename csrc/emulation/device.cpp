// The emulated device, and what tests tell it.

#include "device.h"

namespace shardcomp::emulation {

Block& block() {
  static thread_local Block held;
  return held;
}

// Little at first, so that rows of tests do not all fit.
int64_t& shared_bytes() {
  static int64_t held = 12 << 10;
  return held;
}

}  // namespace shardcomp::emulation

// The schedule of all blocks from now on; 0 is the one in order.
extern "C" __attribute__((visibility("default"))) void shardcomp_seed(uint64_t seed) { shardcomp::emulation::block().seed(seed); }
extern "C" __attribute__((visibility("default"))) void shardcomp_shared_bytes(int64_t bytes) {
  shardcomp::emulation::shared_bytes() = bytes;
}
