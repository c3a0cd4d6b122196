// The interface of the CPU's kernels, the same for every instruction set that they are compiled for.
//
// A kernel does the rows, blocks, columns or elements [begin, end) of its work, whichever its arguments count. The binding
// splits the whole over torch's threads. Any split gives the same bits: no sum crosses a border, and blocks depend on the shape
// alone.
#pragma once

#include "../core/arguments.h"

namespace shardcomp {

// Kernels over lists of tensors count blocks of `block` elements; the last block of a tensor may have fewer.
struct AdamWShard {
  Rows rows;  // of gradient, weight, exp_avg, exp_avg_sq and copy
  int64_t first_block;
  DType gradient_dtype;  // fp64 where the weight is, else another
  DType copy_dtype;      // bf16 or fp16
  const void* gradient;
  void* weight;  // wide
  void* exp_avg;
  void* exp_avg_sq;
  void* copy;   // null: there is none
  double size;  // lr / (1 - beta1^t)
  double root;  // sqrt(1 - beta2^t)
};

struct AdamW {
  int64_t block;
  int64_t count;
  const AdamWShard* shards;
  double beta1;
  double beta2;
  double eps;
  double decay;  // of each weight: 1 - lr · weight_decay
  double scale;  // of each gradient
};

struct SquaresShard {
  Rows rows;
  int64_t first_block;
  DType dtype;
  const void* x;
};

struct Squares {
  int64_t block;
  int64_t count;
  const SquaresShard* shards;
  double* partial;  // [blocks]
};

// Every kernel with its arguments: from this one list come the declarations of all levels and the choice between them.
#define SHARDCOMP_CPU_KERNELS(kernel)                      \
  kernel(rms_norm, RmsNorm)                                \
  kernel(rms_norm_bwd, RmsNormBwd)                         \
  kernel(layer_norm, LayerNorm)                            \
  kernel(layer_norm_bwd, LayerNormBwd)                     \
  kernel(summed, Summed)                                   \
  kernel(rotary, Rotary)                                   \
  kernel(gated, Gated)                                     \
  kernel(gated_bwd, GatedBwd)                              \
  kernel(cross_entropy_statistics, CrossEntropyStatistics) \
  kernel(cross_entropy_gradient, CrossEntropyGradient)     \
  kernel(adamw, AdamW)                                     \
  kernel(squares, Squares)

namespace cpu {

#define SHARDCOMP_DECLARE(name, Arguments) void name(const Arguments& a, int64_t begin, int64_t end);

// The build compiles every source of this folder once per level and names the level's namespace.
namespace base {
SHARDCOMP_CPU_KERNELS(SHARDCOMP_DECLARE)
}
#if defined(__x86_64__)
namespace v3 {
SHARDCOMP_CPU_KERNELS(SHARDCOMP_DECLARE)
}
namespace v4 {
SHARDCOMP_CPU_KERNELS(SHARDCOMP_DECLARE)
}
#endif

#undef SHARDCOMP_DECLARE

}  // namespace cpu
}  // namespace shardcomp
