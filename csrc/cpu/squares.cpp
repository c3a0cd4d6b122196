// The sum of the squares of a list of tensors, for the norm of the gradient: one number in double for each block. Each element
// is read once.
//
// Squares are taken and added in double: the square of a float is exact there, nothing overflows on the way, and the result
// does not depend on how parameters are split but for its last rounding.

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

// The sum of the squares of `size` elements. 32 running sums, each over every 32nd element, at every level: the bits do not
// depend on the width of the processor's vectors.
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
  double total = 0;
  for (const Doubles& vector : sums) {
    for (int k = 0; k < wide_lanes; ++k) total += vector[k];
  }
  return total;
}

void squares(const Squares& a, int64_t begin, int64_t end) {
  blocks(a.shards, a.count, a.block, begin, end, [&](const SquaresShard& shard, int64_t at, int64_t first, int64_t last) INLINED {
    of_dtype(shard.dtype, [&](auto element) INLINED {
      typedef decltype(element) T;
      double total = 0;
      row_segments(shard.rows, first, last, [&](const int64_t* offset, int64_t size) INLINED {
        total += squares_of(static_cast<const T*>(shard.x) + offset[0], size);
      });
      a.partial[at] = total;
    });
  });
}

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
