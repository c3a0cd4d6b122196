// The arguments of every kernel: plain structs of pointers, sizes and options, the same for the CPU and for CUDA.
//
// Nothing here or in the kernels includes torch. A kernel then compiles in a second instead of a minute, needs no rebuild for
// another torch, and runs under the emulation of csrc/emulation as it is. csrc/binding turns tensors into these structs.
//
// Names of shapes: [rows] is every dimension but the last, h is the last one. "Wide" is the dtype that a kernel computes in:
// float32, or float64 for float64. 16-bit inputs are widened because their 8 or 11 bits of mantissa cannot carry a sum over a
// row.
#pragma once

#include <cstdint>

namespace shardcomp {

enum class DType : int32_t { bf16, fp16, fp32, fp64 };

inline int64_t size_of(DType dtype) { return dtype == DType::fp64 ? 8 : dtype == DType::fp32 ? 4 : 2; }

// The memory layout of up to six tensors of one shape, as rows. A row is `width` adjacent elements. `sizes` are the other
// dimensions, the last one varying fastest; strides count elements. A stride of 0 is a broadcast dimension.
//
// Strided inputs are read in place: a copy would cost as much memory traffic as most of these kernels. All offsets are 64-bit,
// since logits of 16k tokens and 128k columns already have 2^31 elements.
constexpr int most_dims = 8;
constexpr int most_tensors = 6;

struct Rows {
  int dims = 0;
  int64_t width = 0;
  int64_t count = 1;
  int64_t sizes[most_dims] = {};
  int64_t strides[most_tensors][most_dims] = {};
};

// Pointers without a comment point to elements of `dtype`, those marked "wide" to the wide dtype.

// A vector [h] that multiplies the values of a row or is added to them; null values: there is none.
//
// The last three fields are read by CUDA's kernels alone. They widen the vector and add the offset on the fly, which saves a
// launch per call; the CPU's kernels get a vector that is wide and has its offset.
struct Factor {
  const void* values;
  bool narrow;    // the values are of `dtype`, else wide
  double offset;  // added to each value first, such as 1 for Gemma's 1 + weight ...
  bool rounded;   // ... and the sum is rounded to the dtype of the values, as a model in that dtype does
};

struct RmsNorm {
  DType dtype;
  Rows rows;             // of x and residual; results are contiguous
  const void* x;
  const void* residual;  // null: there is none
  Factor factor;         // the weight
  double eps;
  bool round_first;      // round the normalised values to `dtype` before the weight, as HuggingFace's LLaMA does
  void* y;
  void* total;           // x + residual; null without a residual
  void* rstd;            // wide, [rows]; all that the backward needs beside its inputs
};

struct RmsNormBwd {
  DType dtype;
  Rows rows;           // of gradient, added and x
  int64_t block_rows;  // rows of a block; the CPU's kernel counts blocks
  const void* gradient;
  const void* added;   // a further gradient of x, that of the residual stream; null: there is none
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
  bool stepwise;  // product and sum are two operations, each rounded; else one fused multiply-add. Read by CUDA's kernel alone
  void* y;        // null: moments only
  void* mean;
  void* rstd;     // wide, [rows] each
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
  void* partial_weight;  // wide, [blocks, h] each; null where no gradient is needed
  void* partial_bias;
};

// The sum over blocks of the partial sums that a norm's backward leaves. Two steps instead of atomics: the order of the
// additions is fixed, so a call gives the same bits every time. The CPU's kernel counts columns.
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
  int64_t rotated;   // the first features of a row, which are rotated; the others are copied
  bool interleaved;  // pairs are neighbours (GPT-J), else feature i and i + rotated / 2 (LLaMA)
  bool backward;     // rotate by the negative angle
  bool round_cos;    // round x · cos to `dtype` before the sum
  bool round_sin;
  const void* x;
  Factor cos;
  Factor sin;
  void* y;
};

enum class Activation : int32_t { silu, gelu, gelu_tanh };

// Kernels over elements: [begin, end) counts width · rows.
struct Gated {
  DType dtype;            // not fp64: torch's own operators compute that
  Activation activation;  // not gelu on the CPU
  Rows rows;              // of gate, up and y
  bool round_first;       // round the activated gate to `dtype` before the product
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
  int64_t first;          // the label of the first column: a rank of a split vocabulary has later ones
  void* statistics;       // wide, [3, rows]: largest logit, sum of exponentials, the label's logit
};

struct CrossEntropyGradient {
  DType dtype;
  Rows rows;  // of logits and gradient
  const void* logits;
  const int64_t* labels;
  const bool* counted;
  const void* normaliser;  // wide, [2, rows]: largest logit and sum of exponentials, over all ranks
  const void* scale;       // wide, [rows]: the gradient of each row's loss
  int64_t first;
  void* gradient;  // may be the logits
};

}  // namespace shardcomp
