// Sums in the order in which torch's CPU kernel adds up the innermost dimension, so that they have its bits (cascade_sum in
// ATen's SumKernel.cpp): vectors of 32 bytes, four at a time, in a cascade of four levels.
//
// Why a cascade: an accumulator is emptied into the next level after 2^power groups, so every number passes through a few short
// sums instead of one long one, and the error grows with the logarithm of the length. Floating-point addition is not
// associative, so the 64-byte vectors of AVX-512 here only pair two of torch's vectors; lanes never mix before the end.
#pragma once

#include "vectors.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

// log2(count), rounded up, at least 1.
INLINE int log2_up(int64_t count) { return count <= 2 ? 1 : 64 - __builtin_clzll(uint64_t(count) - 1); }

// The sum over [0, size) of f(at, n), which gives the vector of elements [at, at + n). f is called in place of a load, so that
// a square or a product is summed without a pass of its own.
template <class W, class F>
INLINE W sum(int64_t size, F f) {
  constexpr int lanes = 32 / sizeof(W), count = Lanes<W>::count;
  typedef Vec<W> V;
  const int64_t groups = size / (4 * lanes), vectors = size / lanes;
  const int rest = int(size % lanes);
  const V last = rest == 0 ? V{} : f(vectors * lanes, rest);
  W total = 0;
  if (vectors == 0) {
    W lane_sums[4] = {};
    for (int k = 0; k < rest; ++k) lane_sums[k < rest / 4 * 4 ? k % 4 : 0] += last[k];
    return ((lane_sums[0] + lane_sums[1]) + lane_sums[2]) + lane_sums[3];
  }
  for (int k = 0; k < rest; ++k) total += last[k];
  const int power = log2_up(groups) / 4 > 4 ? log2_up(groups) / 4 : 4;
  const int64_t step = int64_t(1) << power;
  // The four accumulators of a group: four vectors of 32 bytes, or two of 64.
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
  W lane_sums[4 * count];
  memcpy(lane_sums, &a, sizeof(V));
  memcpy(lane_sums + count, &b, sizeof(V));
  memcpy(lane_sums + 2 * count, &c, sizeof(V));
  memcpy(lane_sums + 3 * count, &d, sizeof(V));
  for (int64_t at = groups * 4 * lanes; at < vectors * lanes; at += lanes) {
    const V more = f(at, lanes);
    for (int k = 0; k < lanes; ++k) lane_sums[k] += more[k];
  }
  for (int k = 0; k < lanes; ++k) {
    total += ((lane_sums[k] + lane_sums[lanes + k]) + lane_sums[2 * lanes + k]) + lane_sums[3 * lanes + k];
  }
  return total;
}

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
