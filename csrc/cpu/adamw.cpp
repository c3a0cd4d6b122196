// One step of AdamW over a list of tensors, each element read and written once: gradient, weight and moments in, weight and
// moments out, and a 16-bit copy of the weight. The formula is in shardcomp/kernels/adamw.py, the scalars of each tensor come
// in float64. Arithmetic is in the dtype of the weight, in the order of torch's own operators.

#include "shards.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

void adamw(const AdamW& a, int64_t begin, int64_t end) {
  blocks(a.shards, a.count, a.block, begin, end, [&](const AdamWShard& shard, int64_t, int64_t first, int64_t last) INLINED {
    of_dtype(shard.gradient_dtype, [&](auto element) INLINED {
      typedef decltype(element) T;
      typedef Wide<T> W;
      typedef Vec<W> V;
      const W scale = W(a.scale), decay = W(a.decay), eps = W(a.eps), size = W(shard.size), root = W(shard.root);
      const W of_square = W(1 - a.beta2), kept_square = W(a.beta2);
      // torch's lerp: m + s (g - m), or from s = 1/2 on g - (1 - s) (g - m), which is exact at s = 1. The bits follow that
      // branch.
      const bool from_old = W(1 - a.beta1) < W(0.5);
      const V share = V{} + (from_old ? W(1 - a.beta1) : W(1 - a.beta1) - W(1));
      row_segments(shard.rows, first, last, [&](const int64_t* offset, int64_t length) INLINED {
        const T* gradient = static_cast<const T*>(shard.gradient) + offset[0];
        W* weight = static_cast<W*>(shard.weight) + offset[1];
        W* exp_avg = static_cast<W*>(shard.exp_avg) + offset[2];
        W* exp_avg_sq = static_cast<W*>(shard.exp_avg_sq) + offset[3];
        uint16_t* copy = shard.copy == nullptr ? nullptr : static_cast<uint16_t*>(shard.copy) + offset[4];
        for_vectors<W>(length, [&](int64_t i, int n) INLINED {
          const V g = load(gradient + i, n) * scale, old = load(exp_avg + i, n);
          const V m = fma(share, g - old, from_old ? old : g);
          const V v = fma(of_square * g, g, load(exp_avg_sq + i, n) * kept_square);
          const V change = m / (square_root(v) / root + eps);
          const V updated = load(weight + i, n) * decay - change * size;
          store(exp_avg + i, m, n);
          store(exp_avg_sq + i, v, n);
          store(weight + i, updated, n);
          if constexpr (sizeof(W) == 4) {
            if (copy != nullptr && shard.copy_dtype == DType::bf16) {
              store(reinterpret_cast<bf16*>(copy + i), updated, n);
            } else if (copy != nullptr) {
              store(reinterpret_cast<fp16*>(copy + i), updated, n);
            }
          }
        });
      });
    });
  });
}

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
