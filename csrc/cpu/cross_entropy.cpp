// Cross entropy of logits [rows, columns] in two kernels: statistics of a softmax over each row, and the gradient of the
// logits.
//
//   statistics:  m = max(x), s = Σ exp(x - m), and the label's logit; the loss is log(s) + m - x[label]
//   gradient:    (exp(x - m) / s - [column is the label]) · scale, zero for rows that do not count
//
// Memory traffic for an element: 1 read for the statistics, 1 read and 1 write for the gradient, which may overwrite the
// logits. Maximum and sum are two passes, because a loop without a rescaling in it is faster; the row is taken in parts that
// stay in the cache between them, and only at the border of two parts is the sum rescaled (online softmax,
// https://arxiv.org/abs/1805.02867).

#include "functions.h"
#include "sums.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

// Logits that are still in the cache when their exponentials are added up: 64 to 256 KiB.
constexpr int64_t cached_logits = 1 << 15;

template <class W>
INLINE W exponential_of(W x) {
  return exponential(Vec<W>{} + x)[0];
}

// The largest logit, which skips NaN (a comparison with NaN is false); -inf if there is none. Four maxima at a time, since each
// comparison waits for the one before it.
template <class W, class T>
INLINE W largest_of(const T* x, int64_t size) {
  constexpr int lanes = Lanes<W>::count;
  constexpr W least = -W(__builtin_inff());
  typedef Vec<W> V;
  V maxima[4] = {V{} + least, V{} + least, V{} + least, V{} + least};
  int64_t at = 0;
  for (; at + 4 * lanes <= size; at += 4 * lanes) {
    for (int k = 0; k < 4; ++k) {
      const V v = load(x + at + k * lanes, lanes);
      maxima[k] = v > maxima[k] ? v : maxima[k];
    }
  }
  W result = least;
  for (; at < size; at += lanes) {
    const int n = size - at < lanes ? int(size - at) : lanes;
    const V v = load(x + at, n);
    for (int k = 0; k < n; ++k) result = v[k] > result ? v[k] : result;
  }
  for (const V& vector : maxima) {
    for (int k = 0; k < lanes; ++k) result = vector[k] > result ? vector[k] : result;
  }
  return result;
}

template <class W, class T>
INLINE bool any_nan(const T* x, int64_t size) {
  for (int64_t at = 0; at < size; ++at) {
    const W v = load(x + at, 1)[0];
    if (v != v) return true;
  }
  return false;
}

// The column of a row's label, or -1 if another rank has it or the row does not count.
template <class Arguments>
INLINE int64_t column_of(const Arguments& a, int64_t row) {
  const int64_t column = a.labels[row] - a.first;
  return a.counted[row] && column >= 0 && column < a.rows.width ? column : -1;
}

void cross_entropy_statistics(const CrossEntropyStatistics& a, int64_t begin, int64_t end) {
  of_dtype(a.dtype, [&](auto element) INLINED {
    typedef decltype(element) T;
    typedef Wide<T> W;
    const int64_t width = a.rows.width;
    W* statistics = static_cast<W*>(a.statistics);
    Cursor cursor(a.rows, begin);
    for (int64_t row = begin; row < end; ++row, cursor.next()) {
      const T* x = static_cast<const T*>(a.logits) + cursor.offset[0];
      W largest = -W(__builtin_inff()), total = 0;
      for (int64_t at = 0; at < width; at += cached_logits) {
        const int64_t size = width - at < cached_logits ? width - at : cached_logits;
        const W here = largest_of<W>(x + at, size);
        if (here > largest) {
          if (at > 0) total *= exponential_of(largest - here);
          largest = here;
        }
        // While the maximum is -inf, x - m would be NaN. With zero in its place all exponentials are zero but those of NaN.
        const W below = largest == -W(__builtin_inff()) ? W(0) : largest;
        total += sum<W>(size, [&](int64_t i, int n) INLINED { return exponential(load(x + at + i, n) - below); });
      }
      // Only a NaN logit makes the maximum NaN; a NaN total may also come from an infinite logit. This second look is rare.
      if (total != total && any_nan<W>(x, width)) largest = total;
      const int64_t column = column_of(a, row);
      statistics[row] = largest;
      statistics[a.rows.count + row] = total;
      statistics[2 * a.rows.count + row] = column < 0 ? W(0) : load(x + column, 1)[0];
    }
  });
}

void cross_entropy_gradient(const CrossEntropyGradient& a, int64_t begin, int64_t end) {
  of_dtype(a.dtype, [&](auto element) INLINED {
    typedef decltype(element) T;
    typedef Wide<T> W;
    typedef Vec<W> V;
    const W* normaliser = static_cast<const W*>(a.normaliser);
    Cursor cursor(a.rows, begin);
    for (int64_t row = begin; row < end; ++row, cursor.next()) {
      const T* x = static_cast<const T*>(a.logits) + cursor.offset[0];
      T* y = static_cast<T*>(a.gradient) + cursor.offset[1];
      if (!a.counted[row]) {
        memset(y, 0, a.rows.width * sizeof(T));
        continue;
      }
      const W largest = normaliser[row], total = normaliser[a.rows.count + row], scale = static_cast<const W*>(a.scale)[row];
      const auto share = [&](V logits) INLINED { return exponential(logits - largest) / total; };
      // The gradient may overwrite the logits, so the label's logit is read first.
      const int64_t column = column_of(a, row);
      const V chosen = column < 0 ? V{} : load(x + column, 1);
      for_vectors<W>(a.rows.width, [&](int64_t i, int n) INLINED { store(y + i, share(load(x + i, n)) * scale, n); });
      if (column >= 0) store(y + column, (share(chosen) - W(1)) * scale, 1);
    }
  });
}

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
