// Memory of one thread, and sums over the rows of a block.
#pragma once

#include <cstdlib>

#include "vectors.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

template <class W>
struct Scratch {
  W* held;
  INLINED explicit Scratch(int64_t size) : held(static_cast<W*>(malloc(size * sizeof(W) + 1))) {
    if (held == nullptr) abort();
  }
  INLINED ~Scratch() { free(held); }
  Scratch(const Scratch&) = delete;
};

// Adds up rows of h numbers into a block's row of `partial`, in two steps so that many rows do not drown in one sum. A null
// `partial` asks for none.
template <class W>
struct BlockSum {
  static constexpr int group = 32;
  W* made;
  W* part;
  int64_t h;
  int held = 0;

  INLINED BlockSum(void* partial, W* scratch, int64_t block, int64_t h)
      : made(partial == nullptr ? nullptr : static_cast<W*>(partial) + block * h), part(scratch), h(h) {
    if (made != nullptr) {
      memset(made, 0, h * sizeof(W));
      memset(part, 0, h * sizeof(W));
    }
  }
  INLINED explicit operator bool() const { return made != nullptr; }

  // What the next row is to be added to.
  INLINED W* row() {
    if (held++ == group) {
      flush();
      held = 1;
    }
    return part;
  }
  INLINED void finish() {
    if (made != nullptr) flush();
  }
  INLINED void flush() {
    each<W>(h, [&](int64_t i, int n) INLINED {
      store(made + i, load(made + i, n) + load(part + i, n), n);
      store(part + i, Vec<W>{}, n);
    });
  }
};

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
