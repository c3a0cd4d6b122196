// Rotary positions of one tensor, forward and backward. A row is the features of one head at one position.

#include "vectors.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

typedef int64_t Longs __attribute__((vector_size(SHARDCOMP_BYTES)));

// Neighbours changed places.
template <class Order, class V>
INLINE V swapped_by(V x) {
  Order order;
  for (int i = 0; i < int(sizeof(x) / sizeof(x[0])); ++i) order[i] = i ^ 1;
  return __builtin_shuffle(x, order);
}
INLINE Floats swapped(Floats x) { return swapped_by<Ints>(x); }
INLINE Vec<double> swapped(Vec<double> x) { return swapped_by<Longs>(x); }

// -1 where the features of a pair stand first, 1 where they stand second.
template <class W>
INLINE Vec<W> signs() {
  Vec<W> made;
  for (int i = 0; i < Lanes<W>::count; ++i) made[i] = i % 2 == 0 ? -1 : 1;
  return made;
}

template <class T, bool interleaved>
INLINE void turn(const Rotary& a, int64_t begin, int64_t end) {
  typedef Wide<T> W;
  typedef Vec<W> V;
  const int64_t low = a.turned / 2, high = a.turned - low;
  Cursor cursor(a.rows, begin);
  for (int64_t row = begin; row < end; ++row, cursor.next()) {
    const T* x = static_cast<const T*>(a.x) + cursor.offset[0];
    T* y = static_cast<T*>(a.y) + cursor.offset[3];
    const W* cos = static_cast<const W*>(a.cos.held) + cursor.offset[1];
    const W* sin = static_cast<const W*>(a.sin.held) + cursor.offset[2];
    const auto put = [&](int64_t i, int n, V turned) INLINED {
      V straight = load(x + i, n) * load(cos + i, n);
      if (a.round_cos) straight = Round<T>::to(straight);
      if (a.round_sin) turned = Round<T>::to(turned);
      store(y + i, straight + turned, n);
    };
    if constexpr (interleaved) {
      const V sign = a.back ? -signs<W>() : signs<W>();
      each<W>(a.turned, [&](int64_t i, int n) INLINED {
        const V s = load(sin + i, n);
        put(i, n, swapped(load(x + i, n)) * sign * (a.back ? swapped(s) : s));
      });
    } else {
      // Each feature turned with the one `apart` places on.
      const auto half = [&](int64_t from, int64_t size, int64_t apart, W sign) {
        const W* s = sin + (a.back ? apart : 0);
        each<W>(size, [&](int64_t at, int n) INLINED {
          const int64_t i = from + at;
          put(i, n, load(x + i + apart, n) * sign * load(s + i, n));
        });
      };
      half(0, low, high, a.back ? 1 : -1);
      half(low, high, -low, a.back ? -1 : 1);
    }
    memcpy(y + a.turned, x + a.turned, (a.rows.width - a.turned) * sizeof(T));
  }
}

void rotary(const Rotary& a, int64_t begin, int64_t end) {
  of_dtype(a.dtype, [&](auto held) INLINED {
    if (a.interleaved) {
      turn<decltype(held), true>(a, begin, end);
    } else {
      turn<decltype(held), false>(a, begin, end);
    }
  });
}

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
