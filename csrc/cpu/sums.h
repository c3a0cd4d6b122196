// Sums in the order in which torch adds up the innermost dimension, so that they have its bits: 8 lanes of float or 4 of double,
// four vectors at a time, in a cascade of four levels that keeps the error small for long rows.
#pragma once

#include "vectors.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

// log2(count) upwards, at least 1.
INLINE int log2_up(int64_t count) { return count <= 2 ? 1 : 64 - __builtin_clzll(uint64_t(count) - 1); }

// The sum of f(at, n), the vectors of [0, size).
template <class W, class F>
INLINE W sum(int64_t size, F f) {
  constexpr int lanes = 32 / sizeof(W), count = Lanes<W>::count;
  typedef Vec<W> V;
  const int64_t groups = size / (4 * lanes), vectors = size / lanes;
  const int rest = int(size % lanes);
  const V last = rest == 0 ? V{} : f(vectors * lanes, rest);
  W made = 0;
  if (vectors == 0) {
    W part[4] = {};
    for (int k = 0; k < rest; ++k) part[k < rest / 4 * 4 ? k % 4 : 0] += last[k];
    return ((part[0] + part[1]) + part[2]) + part[3];
  }
  for (int k = 0; k < rest; ++k) made += last[k];
  const int power = log2_up(groups) / 4 > 4 ? log2_up(groups) / 4 : 4;
  const int64_t step = int64_t(1) << power;
  // A group's four vectors of `lanes`, in four vectors of this level or in two.
  V a{}, b{}, c{}, d{};
  V upper[3][4] = {};
  for (int64_t i = 0; i < groups;) {
    for (const int64_t until = i + step < groups ? i + step : groups; i < until; ++i) {
      const int64_t at = i * 4 * lanes;
      a += f(at, count);
      b += f(at + count, count);
      if constexpr (count == lanes) {
        c += f(at + 2 * count, count);
        d += f(at + 3 * count, count);
      }
    }
    if ((i & (step - 1)) != 0) break;
    upper[0][0] += a, upper[0][1] += b, upper[0][2] += c, upper[0][3] += d;
    a = b = c = d = V{};
    for (int level = 1; level < 3 && (i & ((step - 1) << (level * power))) == 0; ++level) {
      for (int k = 0; k < 4; ++k) {
        upper[level][k] += upper[level - 1][k];
        upper[level - 1][k] = V{};
      }
    }
  }
  for (int level = 0; level < 3; ++level) {
    a += upper[level][0], b += upper[level][1], c += upper[level][2], d += upper[level][3];
  }
  W part[4 * count];
  memcpy(part, &a, sizeof(V));
  memcpy(part + count, &b, sizeof(V));
  memcpy(part + 2 * count, &c, sizeof(V));
  memcpy(part + 3 * count, &d, sizeof(V));
  for (int64_t at = groups * 4 * lanes; at < vectors * lanes; at += lanes) {
    const V more = f(at, lanes);
    for (int k = 0; k < lanes; ++k) part[k] += more[k];
  }
  for (int k = 0; k < lanes; ++k) made += ((part[k] + part[lanes + k]) + part[2 * lanes + k]) + part[3 * lanes + k];
  return made;
}

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
