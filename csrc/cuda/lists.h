// The blocks of a list of tensors, counted as if the tensors were one.
#pragma once

#include <algorithm>

#include "device.h"

namespace shardcomp::cuda {
namespace {

// The tensor of a block: the last one whose first block is no later. A binary search in the kernel's parameters, which are in
// constant memory and cached; all threads of a block take the same path.
template <class Arguments>
DEVICE int shard_of(const Arguments& a, int64_t block) {
  int at = 0;
  for (int above = a.count; above - at > 1;) {
    const int middle = at + (above - at) / 2;
    if (a.shards[middle].first_block <= block) {
      at = middle;
    } else {
      above = middle;
    }
  }
  return at;
}

// Tensors are often views of a flat buffer, which may begin anywhere: each tensor chooses its path for itself.
DEVICE bool aligned_to_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace
}  // namespace shardcomp::cuda
