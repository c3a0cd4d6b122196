// RMS norm (Zhang and Sennrich, https://arxiv.org/abs/1910.07467), with or without a residual addition before it, and the
// backward of both. x is [rows, h]; arithmetic is in float, or double for fp64.
//
//   forward:   s = x + residual, rounded;  rstd = 1 / √(mean(s²) + eps);  y = s · rstd · (offset + weight)
//   backward:  with n = s · rstd and g = gradient · (offset + weight):
//              of_x = (g - n · mean(g · n)) · rstd + added;  of_weight = Σ over rows of gradient · n
//
// Memory traffic for an element: 2 accesses forward, 4 with a residual; 3 backward, 4 with `added`. Later passes over a row
// find it in the cache. The bits are those of HuggingFace's chain of operators, the sum over a row included (sums.h).

#include "scratch.h"
#include "sums.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

void rms_norm(const RmsNorm& a, int64_t begin, int64_t end) {
  of_dtype(a.dtype, [&](auto element) INLINED {
    typedef decltype(element) T;
    typedef Wide<T> W;
    typedef Vec<W> V;
    const int64_t h = a.rows.width;
    const W* factor = static_cast<const W*>(a.factor.values);
    Cursor cursor(a.rows, begin);
    for (int64_t row = begin; row < end; ++row, cursor.next()) {
      const T* x = static_cast<const T*>(a.x) + cursor.offset[0];
      if (a.residual != nullptr) {
        const T* residual = static_cast<const T*>(a.residual) + cursor.offset[1];
        T* total = static_cast<T*>(a.total) + row * h;
        for_vectors<W>(h, [&](int64_t i, int n) INLINED { store(total + i, load(x + i, n) + load(residual + i, n), n); });
        x = total;  // the norm sees the rounded sum
      }
      const W squares = sum<W>(h, [&](int64_t i, int n) INLINED {
        const V v = load(x + i, n);
        return v * v;
      });
      const W mean = squares / W(h) + W(a.eps);
      // 1 / √ in full precision; the processor's approximate rsqrt would be off in its last bits.
      const W rstd = W(1) / (sizeof(W) == 8 ? W(__builtin_sqrt(mean)) : W(__builtin_sqrtf(float(mean))));
      static_cast<W*>(a.rstd)[row] = rstd;
      T* y = static_cast<T*>(a.y) + row * h;
      for_vectors<W>(h, [&](int64_t i, int n) INLINED {
        V value = load(x + i, n) * rstd;
        if (factor != nullptr) value = (a.round_first ? Round<T>::to(value) : value) * load(factor + i, n);
        store(y + i, value, n);
      });
    }
  });
}

void rms_norm_bwd(const RmsNormBwd& a, int64_t begin, int64_t end) {
  of_dtype(a.dtype, [&](auto element) INLINED {
    typedef decltype(element) T;
    typedef Wide<T> W;
    typedef Vec<W> V;
    const int64_t h = a.rows.width;
    const W* factor = static_cast<const W*>(a.factor.values);
    Scratch<W> scratch(a.partial == nullptr ? h : 2 * h);
    W* products = scratch.data;  // g · n of one row: `sum` visits elements in an order of its own
    for (int64_t block = begin; block < end; ++block) {
      BlockSum<W> of_weight(a.partial, scratch.data + h, block, h);
      const int64_t first = block * a.block_rows, last = first + a.block_rows;
      Cursor cursor(a.rows, first);
      for (int64_t row = first; row < last && row < a.rows.count; ++row, cursor.next()) {
        const T* gradient = static_cast<const T*>(a.gradient) + cursor.offset[0];
        const T* x = static_cast<const T*>(a.x) + cursor.offset[2];
        const W rstd = static_cast<const W*>(a.rstd)[row];
        const auto scaled = [&](int64_t i, int n) INLINED {
          const V g = load(gradient + i, n);
          return factor == nullptr ? g : g * load(factor + i, n);
        };
        W* of_row = of_weight ? of_weight.row() : nullptr;
        for_vectors<W>(h, [&](int64_t i, int n) INLINED {
          const V normal = load(x + i, n) * rstd;
          store(products + i, scaled(i, n) * normal, n);
          if (of_row != nullptr) store(of_row + i, load(of_row + i, n) + load(gradient + i, n) * normal, n);
        });
        const W mean = sum<W>(h, [&](int64_t i, int n) INLINED { return load(products + i, n); }) / W(h);
        T* of_x = static_cast<T*>(a.of_x) + row * h;
        const T* added = a.added == nullptr ? nullptr : static_cast<const T*>(a.added) + cursor.offset[1];
        for_vectors<W>(h, [&](int64_t i, int n) INLINED {
          V value = (scaled(i, n) - load(x + i, n) * rstd * mean) * rstd;
          if (added != nullptr) value = value + load(added + i, n);
          store(of_x + i, value, n);
        });
      }
      of_weight.finish();
    }
  });
}

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
