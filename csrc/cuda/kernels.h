// The interface of CUDA's kernels: `run` launches the kernel of its arguments on a stream.
//
// Nothing here or in the kernels includes torch, waits for the device or allocates memory, so that every call can be recorded
// in a CUDA graph. The order of a sum depends on the device and the shape alone: a call gives the same bits every time.
#pragma once

#include <initializer_list>

#include "../core/arguments.h"

namespace shardcomp::cuda {

// A stream, and the facts about its device that decide a launch.
struct Device {
  void* stream;
  int multiprocessors;
  int64_t shared;  // bytes of shared memory that one block can request
};

// The rows of each block in a norm's backward, which makes `sums` sums of each column (1 for a weight, 2 with a bias).
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

// Kernels over lists of tensors, each of them dense in memory. One launch covers many tensors: a model has hundreds of
// parameters, and a launch for each costs more than the small ones take. A block does `list_block` elements of one tensor (128
// KiB of float32), the last block of a tensor fewer.
//
// The pointers travel in the kernel's parameters, not in a table in device memory, which would need a copy from the host and
// memory that outlives it. Parameters hold 4 KiB, which gives the most tensors of a launch; the binding starts as many launches
// as it takes.
constexpr int64_t list_block = 1 << 15;

// A scalar in device memory, such as the learning rate, read by the kernel so that the host never waits for it; null: there is
// none.
struct Number {
  const void* value;
  DType dtype;
};

// The scalars of a step, which a kernel of one thread per tensor computes first, in float64. `numbers` gets found_inf, the
// scale of the gradients and the decay of the weights, and then for each tensor lr / (1 - beta1^t) and sqrt(1 - beta2^t).
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
  double* numbers;
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
  int32_t place;  // of the tensor in the whole list, which finds its numbers
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

// The limit on every architecture that is built for.
constexpr int most_parameter_bytes = 4096;
static_assert(sizeof(AdamWNumbers) <= most_parameter_bytes && sizeof(AdamW) <= most_parameter_bytes &&
              sizeof(Squares) <= most_parameter_bytes);

void run(const AdamWNumbers& a, const Device& device);
void run(const AdamW& a, const Device& device);
void run(const Squares& a, const Device& device);
void run(const SquaresSum& a, const Device& device);

}  // namespace shardcomp::cuda
