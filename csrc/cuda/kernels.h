// The kernels of CUDA devices: what starts each of them on a stream. Nothing here or in the kernels knows torch, waits for the
// device or takes memory of it. Sums are made in an order that depends on the device and the shape alone, so that a call gives
// the same bits every time.
#pragma once

#include <initializer_list>

#include "../core/arguments.h"

namespace shardcomp::cuda {

// Where kernels are started, and what there is of it.
struct Device {
  void* stream;
  int multiprocessors;
  int64_t shared;  // bytes of shared memory that a block can have
};

// Rows that each block of a norm's backward goes through; so many sums are made of each column.
int64_t block_rows(DType dtype, const Rows& rows, int sums, const Device& device);

void run(const RmsNorm& a, const Device& device);
void run(const RmsNormBwd& a, const Device& device);
void run(const LayerNorm& a, const Device& device);
void run(const LayerNormBwd& a, const Device& device);
void run(const Summed& a, const Device& device);
void run(const Rotary& a, const Device& device);
void run(const Gated& a, const Device& device);
void run(const GatedBwd& a, const Device& device);
void run(const CrossEntropyStatistics& a, const Device& device);
void run(const CrossEntropyGradient& a, const Device& device);

// Kernels over many tensors, each of which lies in one piece. They count blocks of as many elements as follow, of which a
// tensor's last one may have fewer; a call is given the tensors that fit in a kernel's parameters.
constexpr int64_t list_block = 1 << 15;

// A number that is read on the device; null: there is none.
struct Number {
  const void* held;
  DType dtype;
};

// What a step is made of beside the tensors; `made` gets found_inf, the gradients' factor and the weights', and then for each
// tensor lr / (1 - beta1^t) and sqrt(1 - beta2^t).
struct AdamWNumbers {
  static constexpr int most = 256;
  int count;
  int64_t first;  // the place of the first tensor in the whole list
  double beta1;
  double beta2;
  double weight_decay;
  bool maximize;
  Number lr;
  Number scale;
  Number found_inf;
  double* made;
  float* steps[most];
};

struct AdamWShard {
  const void* gradient;
  void* weight;
  void* exp_avg;
  void* exp_avg_sq;
  void* copy;
  int64_t size;
  int32_t first_block;
  int16_t gradient_dtype;
  int16_t copy_dtype;
  int32_t place;  // of its numbers
};

struct AdamW {
  static constexpr int most = 60;
  DType dtype;  // of the weights
  int count;
  int64_t blocks;
  double beta1;
  double beta2;
  double eps;
  const double* numbers;
  AdamWShard shards[most];
};

struct SquaresShard {
  const void* x;
  int64_t size;
  int32_t first_block;
  int32_t dtype;
};

struct Squares {
  static constexpr int most = 160;
  int count;
  int64_t blocks;
  double* partial;  // [blocks]
  SquaresShard shards[most];
};

struct SquaresSum {
  int64_t blocks;
  const double* partial;
  DType dtype;  // fp32 or fp64
  void* sum;
};

constexpr int most_parameter_bytes = 4096;
static_assert(sizeof(AdamWNumbers) <= most_parameter_bytes && sizeof(AdamW) <= most_parameter_bytes &&
              sizeof(Squares) <= most_parameter_bytes);

void run(const AdamWNumbers& a, const Device& device);
void run(const AdamW& a, const Device& device);
void run(const Squares& a, const Device& device);
void run(const SquaresSum& a, const Device& device);

}  // namespace shardcomp::cuda
