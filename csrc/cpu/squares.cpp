// The sum of the squares of many tensors.

#include "shards.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

typedef Vec<double> Doubles;

INLINE void add_squares(Doubles* sums, Floats x) {
  typedef float Half __attribute__((vector_size(SHARDCOMP_BYTES / 2)));
  Half halves[2];
  memcpy(halves, &x, sizeof(x));
  for (int k = 0; k < 2; ++k) {
    const Doubles wide = __builtin_convertvector(halves[k], Doubles);
    sums[k] += wide * wide;
  }
}
INLINE void add_squares(Doubles* sums, Doubles x) { sums[0] += x * x; }

// The sum of the squares of `size` elements, of which every 32nd are added up first, whatever the vectors.
template <class T>
INLINE double squares_of(const T* x, int64_t size) {
  typedef Wide<T> W;
  constexpr int step = 32, lanes = Lanes<W>::count, wide_lanes = Lanes<double>::count;
  Doubles sums[step / wide_lanes] = {};
  int64_t at = 0;
  for (; at + step <= size; at += step) {
    for (int k = 0; k < step; k += lanes) add_squares(sums + k / wide_lanes, load(x + at + k, lanes));
  }
  for (int k = 0; at + k < size; k += lanes) {
    const int64_t rest = size - at - k;
    add_squares(sums + k / wide_lanes, load(x + at + k, rest < lanes ? int(rest) : lanes));
  }
  double made = 0;
  for (const Doubles& each : sums) {
    for (int k = 0; k < wide_lanes; ++k) made += each[k];
  }
  return made;
}

void squares(const Squares& a, int64_t begin, int64_t end) {
  blocks(a.shards, a.count, a.block, begin, end, [&](const SquaresShard& shard, int64_t at, int64_t first, int64_t last) INLINED {
    of_dtype(shard.dtype, [&](auto held) INLINED {
      typedef decltype(held) T;
      double made = 0;
      pieces(shard.rows, first, last, [&](const int64_t* offset, int64_t size) INLINED {
        made += squares_of(static_cast<const T*>(shard.x) + offset[0], size);
      });
      a.partial[at] = made;
    });
  });
}

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
