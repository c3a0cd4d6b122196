// The sum of the squares of a list of tensors, for the norm of the gradient. Each block leaves one number in float64, and one
// more block adds these up in order: no atomics, the same bits every time. Each element is read once and nothing is written but
// [blocks].
//
// Why float64: a float32 sum of 10^10 squares loses digits, and loses others for every way to split the parameters. The sum is
// rounded to float32 once, at the end; one that float32 cannot represent is infinite, as in the reference.

#include "lists.h"

namespace shardcomp::cuda {
namespace {

// The 2 to 8 elements of one load are added in the wide dtype, everything after that in double: a double addition for every
// element would not keep up with memory on devices with few float64 units.
template <class T>
DEVICE double squares_of(const T* x, int64_t first, int64_t last) {
  constexpr int n = lanes<T>;
  const bool vectorized = aligned_to_16(x);
  double total = 0;
#pragma unroll 4
  for (int64_t at = first + threadIdx.x * n; at < last; at += int64_t(blockDim.x) * n) {
    Wide<T> v[n], sum = 0;
    load(v, x + at, last - at, vectorized);
#pragma unroll
    for (int j = 0; j < n; ++j) sum += v[j] * v[j];
    total += sum;
  }
  return total;
}

__global__ void __launch_bounds__(256) squares(const __grid_constant__ Squares a) {
  const SquaresShard& shard = a.shards[shard_of(a, blockIdx.x)];
  const int64_t first = (blockIdx.x - shard.first_block) * list_block;
  const int64_t last = first + list_block < shard.size ? first + list_block : shard.size;
  double total[1] = {};
  switch (DType(shard.dtype)) {
    case DType::bf16: total[0] = squares_of(static_cast<const bf16*>(shard.x), first, last); break;
    case DType::fp16: total[0] = squares_of(static_cast<const fp16*>(shard.x), first, last); break;
    case DType::fp32: total[0] = squares_of(static_cast<const float*>(shard.x), first, last); break;
    case DType::fp64: total[0] = squares_of(static_cast<const double*>(shard.x), first, last); break;
  }
  row_sum(total);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = total[0];
}

__global__ void __launch_bounds__(most_threads) squares_sum(const __grid_constant__ SquaresSum a) {
  double total[1] = {};
#pragma unroll 4
  for (int64_t at = threadIdx.x; at < a.blocks; at += blockDim.x) total[0] += a.partial[at];
  row_sum(total);
  if (threadIdx.x != 0) return;
  if (a.dtype == DType::fp64) {
    *static_cast<double*>(a.sum) = total[0];
  } else {
    *static_cast<float*>(a.sum) = float(total[0]);
  }
}

}  // namespace

void run(const Squares& a, const Device& device) { start(device, squares, Shape{a.blocks, 256, 1, exchange_bytes}, a); }

void run(const SquaresSum& a, const Device& device) {
  start(device, squares_sum, Shape{1, most_threads, 1, exchange_bytes}, a);
}

}  // namespace shardcomp::cuda
