// Layer norm (Ba, Kiros and Hinton, https://arxiv.org/abs/1607.06450), its backward, and the sum over blocks that ends the
// backward of every norm. x is [rows, h]; arithmetic is in float, or double for fp64.
//
//   forward:   rstd = 1 / √(mean((x - mean)²) + eps);  y = (x - mean) · rstd · weight + bias
//   backward:  with n = (x - mean) · rstd and g = gradient · weight:
//              of_x = (g - mean(g) - n · mean(g · n)) · rstd;  of_weight = Σ gradient · n;  of_bias = Σ gradient, over rows
//
// A row is read three times forward, but from memory once: the later passes find it in the cache. The two passes of the
// variance avoid the cancellation of mean(x²) - mean(x)². Every operation rounds as the reference's chain of torch operators
// does.

#include "scratch.h"
#include "sums.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

void layer_norm(const LayerNorm& a, int64_t begin, int64_t end) {
  of_dtype(a.dtype, [&](auto element) INLINED {
    typedef decltype(element) T;
    typedef Wide<T> W;
    typedef Vec<W> V;
    const int64_t h = a.rows.width;
    const W* weight = static_cast<const W*>(a.weight.values);
    const W* bias = static_cast<const W*>(a.bias.values);
    Cursor cursor(a.rows, begin);
    for (int64_t row = begin; row < end; ++row, cursor.next()) {
      const T* x = static_cast<const T*>(a.x) + cursor.offset[0];
      const W mean = sum<W>(h, [&](int64_t i, int n) INLINED { return load(x + i, n); }) / W(h);
      const W squares = sum<W>(h, [&](int64_t i, int n) INLINED {
        const V v = load(x + i, n) - mean;
        return v * v;
      });
      const W variance = squares / W(h) + W(a.eps);
      const W rstd = W(1) / (sizeof(W) == 8 ? W(__builtin_sqrt(variance)) : W(__builtin_sqrtf(float(variance))));
      static_cast<W*>(a.mean)[row] = mean;
      static_cast<W*>(a.rstd)[row] = rstd;
      // Without y the values come from torch's own operator, whose bits depend on its build; the moments are for the backward.
      if (a.y == nullptr) continue;
      T* y = static_cast<T*>(a.y) + row * h;
      for_vectors<W>(h, [&](int64_t i, int n) INLINED {
        V value = (load(x + i, n) - mean) * rstd;
        if (weight != nullptr) value = value * load(weight + i, n);
        if (bias != nullptr) value = value + load(bias + i, n);
        store(y + i, value, n);
      });
    }
  });
}

void layer_norm_bwd(const LayerNormBwd& a, int64_t begin, int64_t end) {
  of_dtype(a.dtype, [&](auto element) INLINED {
    typedef decltype(element) T;
    typedef Wide<T> W;
    typedef Vec<W> V;
    const int64_t h = a.rows.width;
    const W* weight = static_cast<const W*>(a.weight.values);
    Scratch<W> scratch(2 * h);
    for (int64_t block = begin; block < end; ++block) {
      BlockSum<W> of_weight(a.partial_weight, scratch.data, block, h);
      BlockSum<W> of_bias(a.partial_bias, scratch.data + h, block, h);
      const int64_t first = block * a.block_rows, last = first + a.block_rows;
      Cursor cursor(a.rows, first);
      for (int64_t row = first; row < last && row < a.rows.count; ++row, cursor.next()) {
        const T* gradient = static_cast<const T*>(a.gradient) + cursor.offset[0];
        const T* x = static_cast<const T*>(a.x) + cursor.offset[1];
        const W mean = static_cast<const W*>(a.mean)[row], rstd = static_cast<const W*>(a.rstd)[row];
        const auto normal = [&](int64_t i, int n) INLINED { return (load(x + i, n) - mean) * rstd; };
        const auto scaled = [&](int64_t i, int n) INLINED {
          const V g = load(gradient + i, n);
          return weight == nullptr ? g : g * load(weight + i, n);
        };
        if (of_weight) {
          W* added = of_weight.row();
          for_vectors<W>(h, [&](int64_t i, int n) INLINED {
            store(added + i, load(added + i, n) + load(gradient + i, n) * normal(i, n), n);
          });
        }
        if (of_bias) {
          W* added = of_bias.row();
          for_vectors<W>(h, [&](int64_t i, int n) INLINED { store(added + i, load(added + i, n) + load(gradient + i, n), n); });
        }
        const W plain = sum<W>(h, scaled) / W(h);
        const W along = sum<W>(h, [&](int64_t i, int n) INLINED { return scaled(i, n) * normal(i, n); }) / W(h);
        T* of_x = static_cast<T*>(a.of_x) + row * h;
        for_vectors<W>(h, [&](int64_t i, int n) INLINED {
          store(of_x + i, (scaled(i, n) - plain - normal(i, n) * along) * rstd, n);
        });
      }
      of_weight.finish();
      of_bias.finish();
    }
  });
}

void summed(const Summed& a, int64_t begin, int64_t end) {
  const auto run = [&](auto narrow_to, auto wide) INLINED {
    typedef decltype(narrow_to) T;
    typedef decltype(wide) W;
    const W* partial = static_cast<const W*>(a.partial);
    T* sums = static_cast<T*>(a.sum);
    for_vectors<W>(end - begin, [&](int64_t i, int n) INLINED {
      Vec<W> total{};
      for (int64_t block = 0; block < a.blocks; ++block) total += load(partial + block * a.width + begin + i, n);
      store(sums + begin + i, total, n);
    });
  };
  if (a.from == DType::fp64) {
    run(double{}, double{});
  } else {
    switch (a.dtype) {
      case DType::bf16: return run(bf16{}, float{});
      case DType::fp16: return run(fp16{}, float{});
      default: return run(float{}, float{});
    }
  }
}

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
