// The sum of the squares of many tensors: one number for each block, which are then added up in order.

#include "lists.h"

namespace shardcomp::cuda {
namespace {

// What 16 bytes hold is added up in their own width, all that follows in double.
template <class T>
DEVICE double squares_of(const T* x, int64_t first, int64_t last) {
  constexpr int n = lanes<T>;
  const bool whole = aligned_to_16(x);
  double made = 0;
#pragma unroll 4
  for (int64_t at = first + threadIdx.x * n; at < last; at += int64_t(blockDim.x) * n) {
    Wide<T> v[n], sum = 0;
    load(v, x + at, last - at, whole);
#pragma unroll
    for (int j = 0; j < n; ++j) sum += v[j] * v[j];
    made += sum;
  }
  return made;
}

__global__ void __launch_bounds__(256) squares(const __grid_constant__ Squares a) {
  const SquaresShard& shard = a.shards[shard_of(a, blockIdx.x)];
  const int64_t first = (blockIdx.x - shard.first_block) * list_block;
  const int64_t last = first + list_block < shard.size ? first + list_block : shard.size;
  double made[1] = {};
  switch (DType(shard.dtype)) {
    case DType::bf16: made[0] = squares_of(static_cast<const bf16*>(shard.x), first, last); break;
    case DType::fp16: made[0] = squares_of(static_cast<const fp16*>(shard.x), first, last); break;
    case DType::fp32: made[0] = squares_of(static_cast<const float*>(shard.x), first, last); break;
    case DType::fp64: made[0] = squares_of(static_cast<const double*>(shard.x), first, last); break;
  }
  row_sum(made);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = made[0];
}

__global__ void __launch_bounds__(most_threads) squares_sum(const __grid_constant__ SquaresSum a) {
  double made[1] = {};
#pragma unroll 4
  for (int64_t at = threadIdx.x; at < a.blocks; at += blockDim.x) made[0] += a.partial[at];
  row_sum(made);
  if (threadIdx.x != 0) return;
  if (a.dtype == DType::fp64) {
    *static_cast<double*>(a.sum) = made[0];
  } else {
    *static_cast<float*>(a.sum) = float(made[0]);
  }
}

}  // namespace

void run(const Squares& a, const Device& device) { start(device, squares, Shape{a.blocks, 256, 1, exchange_bytes}, a); }

void run(const SquaresSum& a, const Device& device) {
  start(device, squares_sum, Shape{1, most_threads, 1, exchange_bytes}, a);
}

}  // namespace shardcomp::cuda
