// Going through the blocks of many tensors as if they were one.
#pragma once

#include <algorithm>

#include "device.h"

namespace shardcomp::cuda {
namespace {

// The tensor that a block is of: the last one that begins no later.
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

DEVICE bool aligned_to_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace
}  // namespace shardcomp::cuda
