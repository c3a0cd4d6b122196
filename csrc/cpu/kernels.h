// The kernels of the CPU and what each is given: the same for every instruction set that they are compiled for.
//
// A kernel does rows, blocks or elements [begin, end) of its work, whichever its arguments count; any split into such ranges
// gives the same bits. Nothing here or in the kernels knows torch.
#pragma once

#include <cstdint>

namespace shardcomp {

enum class DType : int32_t { bf16, fp16, fp32, fp64 };

inline int64_t size_of(DType dtype) { return dtype == DType::fp64 ? 8 : dtype == DType::fp32 ? 4 : 2; }

// Where the rows of up to six tensors of one shape lie. A row is `width` elements, one after the other; `sizes` are the other
// dimensions, the last one varying fastest, and strides count elements.
constexpr int most_dims = 8;
constexpr int most_tensors = 6;

struct Rows {
  int dims = 0;
  int64_t width = 0;
  int64_t count = 1;
  int64_t sizes[most_dims] = {};
  int64_t strides[most_tensors][most_dims] = {};
};

// Pointers without a dtype are to elements of `dtype`; "wide" ones to float, or to double where that is fp64.

struct RmsNorm {
  DType dtype;
  Rows rows;             // of x and residual; results are contiguous
  const void* x;
  const void* residual;  // null: there is none
  const void* factor;    // wide, [h]: offset + weight; null: there is none
  double eps;
  bool round_first;
  void* y;
  void* total;           // x + residual; null without one
  void* rstd;            // wide, [rows]
};

struct RmsNormBwd {
  DType dtype;
  Rows rows;           // of gradient, added and x
  int64_t block_rows;  // rows of a block; the kernel counts blocks
  const void* gradient;
  const void* added;   // null: there is none
  const void* x;
  const void* factor;  // wide, [h]; null: there is none
  const void* rstd;    // wide, [rows]
  void* of_x;
  void* partial;       // wide, [blocks, h]: the weight's gradient of each block; null without a weight
};

struct LayerNorm {
  DType dtype;
  Rows rows;  // of x
  const void* x;
  const void* weight;  // wide, [h]; null: there is none
  const void* bias;    // the same
  double eps;
  void* y;  // null: moments only
  void* mean;
  void* rstd;  // wide, [rows] each
};

struct LayerNormBwd {
  DType dtype;
  Rows rows;  // of gradient and x
  int64_t block_rows;
  const void* gradient;
  const void* x;
  const void* weight;
  const void* mean;
  const void* rstd;
  void* of_x;
  void* partial_weight;  // wide, [blocks, h] each; null where not asked for
  void* partial_bias;
};

// The sum of partials over blocks, one after the other. The kernel counts columns.
struct Summed {
  DType from;  // fp32 or fp64
  DType dtype;
  int64_t blocks;
  int64_t width;
  const void* partial;
  void* sum;
};

struct Rotary {
  DType dtype;
  Rows rows;         // of x, y, cos and sin; the width is that of x and y
  int64_t turned;    // so many features are turned, the others passed through
  bool interleaved;
  bool back;
  bool round_cos;  // x · cos is rounded to `dtype`
  bool round_sin;
  const void* x;
  const void* cos;  // wide
  const void* sin;
  void* y;
};

enum class Activation : int32_t { silu, gelu, gelu_tanh };

// Kernels over elements: [begin, end) counts width · rows.
struct Gated {
  DType dtype;            // not fp64
  Activation activation;  // not gelu
  Rows rows;  // of gate, up and y
  bool round_first;
  const void* gate;
  const void* up;
  void* y;
};

struct GatedBwd {
  DType dtype;
  Activation activation;
  Rows rows;  // of gradient, gate, up, of_gate and of_up
  const void* gradient;
  const void* gate;
  const void* up;
  void* of_gate;
  void* of_up;
};

struct CrossEntropyStatistics {
  DType dtype;
  Rows rows;  // of logits
  const void* logits;
  const int64_t* labels;  // [rows]
  const bool* counted;    // [rows]
  int64_t first;          // the label of the first column
  void* statistics;       // wide, [3, rows]
};

struct CrossEntropyGradient {
  DType dtype;
  Rows rows;  // of logits and gradient
  const void* logits;
  const int64_t* labels;
  const bool* counted;
  const void* normaliser;  // wide, [2, rows]
  const void* scale;       // wide, [rows]
  int64_t first;
  void* gradient;  // may be the logits
};

// Kernels over many tensors: they count blocks of `block` elements, of which a tensor's last one may have fewer.
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
  double decay;  // what a weight is multiplied by
  double scale;  // what a gradient is multiplied by
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

// Every kernel, with its arguments.
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
