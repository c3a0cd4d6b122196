// Rotary position embedding (Su et al., https://arxiv.org/abs/2104.09864) of one tensor, forward and backward. A row is the
// features of one head at one position.
//
//   y = x · cos + rotate_half(x) · sin, where rotate_half pairs feature i with i + rotated / 2, or neighbours if `interleaved`
//
// The backward is the transpose: the sine of the partner, with the other sign. Each element is read and written once; the
// tables of a position stay in the cache for its heads. Products are rounded to T before the sum if the tables are in T, as in
// the model.

#include "vectors.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

typedef int64_t Longs __attribute__((vector_size(SHARDCOMP_BYTES)));

// The two elements of each pair swapped.
template <class Order, class V>
INLINE V swap_pairs_by(V x) {
  Order order;
  for (int i = 0; i < int(sizeof(x) / sizeof(x[0])); ++i) order[i] = i ^ 1;
  return __builtin_shuffle(x, order);
}
INLINE Floats swap_pairs(Floats x) { return swap_pairs_by<Ints>(x); }
INLINE Vec<double> swap_pairs(Vec<double> x) { return swap_pairs_by<Longs>(x); }

// The sign of the partner: -1 for the first feature of a pair, 1 for the second.
template <class W>
INLINE Vec<W> signs() {
  Vec<W> sign;
  for (int i = 0; i < Lanes<W>::count; ++i) sign[i] = i % 2 == 0 ? -1 : 1;
  return sign;
}

template <class T, bool interleaved>
INLINE void rotate(const Rotary& a, int64_t begin, int64_t end) {
  typedef Wide<T> W;
  typedef Vec<W> V;
  const int64_t low = a.rotated / 2, high = a.rotated - low;
  Cursor cursor(a.rows, begin);
  for (int64_t row = begin; row < end; ++row, cursor.next()) {
    const T* x = static_cast<const T*>(a.x) + cursor.offset[0];
    T* y = static_cast<T*>(a.y) + cursor.offset[3];
    const W* cos = static_cast<const W*>(a.cos.values) + cursor.offset[1];
    const W* sin = static_cast<const W*>(a.sin.values) + cursor.offset[2];
    const auto put = [&](int64_t i, int n, V rotated) INLINED {
      V straight = load(x + i, n) * load(cos + i, n);
      if (a.round_cos) straight = Round<T>::to(straight);
      if (a.round_sin) rotated = Round<T>::to(rotated);
      store(y + i, straight + rotated, n);
    };
    if constexpr (interleaved) {
      const V sign = a.backward ? -signs<W>() : signs<W>();
      for_vectors<W>(a.rotated, [&](int64_t i, int n) INLINED {
        const V s = load(sin + i, n);
        put(i, n, swap_pairs(load(x + i, n)) * sign * (a.backward ? swap_pairs(s) : s));
      });
    } else {
      // One half: the partner of each feature is `distance` elements away.
      const auto half = [&](int64_t from, int64_t size, int64_t distance, W sign) {
        const W* s = sin + (a.backward ? distance : 0);
        for_vectors<W>(size, [&](int64_t at, int n) INLINED {
          const int64_t i = from + at;
          put(i, n, load(x + i + distance, n) * sign * load(s + i, n));
        });
      };
      half(0, low, high, a.backward ? 1 : -1);
      half(low, high, -low, a.backward ? -1 : 1);
    }
    memcpy(y + a.rotated, x + a.rotated, (a.rows.width - a.rotated) * sizeof(T));
  }
}

void rotary(const Rotary& a, int64_t begin, int64_t end) {
  of_dtype(a.dtype, [&](auto element) INLINED {
    if (a.interleaved) {
      rotate<decltype(element), true>(a, begin, end);
    } else {
      rotate<decltype(element), false>(a, begin, end);
    }
  });
}

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
