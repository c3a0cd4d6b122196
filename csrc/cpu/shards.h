// The blocks of a list of tensors, counted as if the tensors were one, so that threads share work evenly whatever the sizes.
#pragma once

#include "vectors.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

// Calls f(shard, at, first, last) for each block `at` in [begin, end): its elements are [first, last) of the shard. A binary
// search finds the first shard; the others follow in order.
template <class Shard, class F>
INLINE void blocks(const Shard* shards, int64_t count, int64_t block, int64_t begin, int64_t end, F f) {
  int64_t at = 0;
  for (int64_t above = count; above - at > 1;) {
    const int64_t middle = at + (above - at) / 2;
    (shards[middle].first_block <= begin ? at : above) = middle;
  }
  for (; begin < end; ++at) {
    const Shard& shard = shards[at];
    const int64_t size = shard.rows.width * shard.rows.count, last_block = shard.first_block + (size + block - 1) / block;
    for (; begin < last_block && begin < end; ++begin) {
      const int64_t first = (begin - shard.first_block) * block;
      f(shard, begin, first, first + block < size ? first + block : size);
    }
  }
}

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
