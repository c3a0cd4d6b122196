// Scratch memory of one call, and sums over the rows of a block.
#pragma once

#include <cstdlib>

#include "vectors.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

// Uninitialised memory for `size` numbers. There is nothing to return an error through, so a failed allocation ends the
// process.
template <class W>
struct Scratch {
  W* data;
  INLINED explicit Scratch(int64_t size) : data(static_cast<W*>(malloc(size * sizeof(W) + 1))) {
    if (data == nullptr) abort();
  }
  INLINED ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
};

// Adds up rows of h numbers into a block's row of `partial`. Groups of 32 rows are summed first and the groups then: with n
// rows in one running sum the last ones would lose about log2(n) bits. A block belongs to one thread and its rows come in
// order, so the bits do not depend on the number of threads. A null `partial` means that no sum is needed.
template <class W>
struct BlockSum {
  static constexpr int group = 32;
  W* out;
  W* group_sum;
  int64_t h;
  int group_rows = 0;

  INLINED BlockSum(void* partial, W* scratch, int64_t block, int64_t h)
      : out(partial == nullptr ? nullptr : static_cast<W*>(partial) + block * h), group_sum(scratch), h(h) {
    if (out != nullptr) {
      memset(out, 0, h * sizeof(W));
      memset(group_sum, 0, h * sizeof(W));
    }
  }
  INLINED explicit operator bool() const { return out != nullptr; }

  // The sums that the next row is added to.
  INLINED W* row() {
    if (group_rows++ == group) {
      flush();
      group_rows = 1;
    }
    return group_sum;
  }
  INLINED void finish() {
    if (out != nullptr) flush();
  }
  INLINED void flush() {
    for_vectors<W>(h, [&](int64_t i, int n) INLINED {
      store(out + i, load(out + i, n) + load(group_sum + i, n), n);
      store(group_sum + i, Vec<W>{}, n);
    });
  }
};

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
