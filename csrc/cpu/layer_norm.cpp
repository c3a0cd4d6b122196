// Layer norm, step by step, its backward, and the sum over blocks that ends the backward of every norm.

#include "scratch.h"
#include "sums.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

void layer_norm(const LayerNorm& a, int64_t begin, int64_t end) {
  of_dtype(a.dtype, [&](auto held) INLINED {
    typedef decltype(held) T;
    typedef Wide<T> W;
    typedef Vec<W> V;
    const int64_t h = a.rows.width;
    const W* weight = static_cast<const W*>(a.weight.held);
    const W* bias = static_cast<const W*>(a.bias.held);
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
      if (a.y == nullptr) continue;
      T* y = static_cast<T*>(a.y) + row * h;
      each<W>(h, [&](int64_t i, int n) INLINED {
        V made = (load(x + i, n) - mean) * rstd;
        if (weight != nullptr) made = made * load(weight + i, n);
        if (bias != nullptr) made = made + load(bias + i, n);
        store(y + i, made, n);
      });
    }
  });
}

void layer_norm_bwd(const LayerNormBwd& a, int64_t begin, int64_t end) {
  of_dtype(a.dtype, [&](auto held) INLINED {
    typedef decltype(held) T;
    typedef Wide<T> W;
    typedef Vec<W> V;
    const int64_t h = a.rows.width;
    const W* weight = static_cast<const W*>(a.weight.held);
    Scratch<W> scratch(2 * h);
    for (int64_t block = begin; block < end; ++block) {
      BlockSum<W> of_weight(a.partial_weight, scratch.held, block, h);
      BlockSum<W> of_bias(a.partial_bias, scratch.held + h, block, h);
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
          each<W>(h, [&](int64_t i, int n) INLINED {
            store(added + i, load(added + i, n) + load(gradient + i, n) * normal(i, n), n);
          });
        }
        if (of_bias) {
          W* added = of_bias.row();
          each<W>(h, [&](int64_t i, int n) INLINED { store(added + i, load(added + i, n) + load(gradient + i, n), n); });
        }
        const W plain = sum<W>(h, scaled) / W(h);
        const W along = sum<W>(h, [&](int64_t i, int n) INLINED { return scaled(i, n) * normal(i, n); }) / W(h);
        T* of_x = static_cast<T*>(a.of_x) + row * h;
        each<W>(h, [&](int64_t i, int n) INLINED {
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
    T* made = static_cast<T*>(a.sum);
    each<W>(end - begin, [&](int64_t i, int n) INLINED {
      Vec<W> total{};
      for (int64_t block = 0; block < a.blocks; ++block) total += load(partial + block * a.width + begin + i, n);
      store(made + begin + i, total, n);
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
