// What kernels are given: the same for every device. Nothing here or in the kernels knows torch.
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

// What the values of a row are multiplied by or what is added to them, [h]; null: there is none. What follows it is for CUDA's
// kernels alone, the CPU's take what is wide and ready.
struct Factor {
  const void* held;
  bool narrow;    // in `dtype`, else wide
  double offset;  // is added to it first ...
  bool rounded;   // ... and the sum rounded to its dtype
};

struct RmsNorm {
  DType dtype;
  Rows rows;             // of x and residual; results are contiguous
  const void* x;
  const void* residual;  // null: there is none
  Factor factor;         // the weight
  double eps;
  bool round_first;
  void* y;
  void* total;           // x + residual; null without one
  void* rstd;            // wide, [rows]
};

struct RmsNormBwd {
  DType dtype;
  Rows rows;           // of gradient, added and x
  int64_t block_rows;  // rows of a block; the CPU's kernel counts blocks
  const void* gradient;
  const void* added;   // null: there is none
  const void* x;
  Factor factor;
  const void* rstd;    // wide, [rows]
  void* of_x;
  void* partial;       // wide, [blocks, h]: the weight's gradient of each block; null without a weight
};

struct LayerNorm {
  DType dtype;
  Rows rows;  // of x
  const void* x;
  Factor weight;
  Factor bias;
  double eps;
  bool stepwise;  // weight and bias round one after the other, else once; CUDA's alone
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
  Factor weight;
  const void* mean;
  const void* rstd;
  void* of_x;
  void* partial_weight;  // wide, [blocks, h] each; null where not asked for
  void* partial_bias;
};

// The sum of partials over blocks. The CPU's kernel counts columns.
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
  Rows rows;         // of x, cos, sin and y; the width is that of x and y
  int64_t turned;    // so many features are turned, the others passed through
  bool interleaved;
  bool back;
  bool round_cos;  // x · cos is rounded to `dtype`
  bool round_sin;
  const void* x;
  Factor cos;
  Factor sin;
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

}  // namespace shardcomp
