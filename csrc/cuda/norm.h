// What norms have in common: which rows are whose, what stays in shared memory, and sums over the rows of a block.
#pragma once

#include <algorithm>

#include "device.h"

namespace shardcomp::cuda {
namespace {

DEVICE int64_t first_row() { return int64_t(blockIdx.x) * blockDim.y + threadIdx.y; }
DEVICE int64_t row_step() { return int64_t(gridDim.x) * blockDim.y; }

// Elements of a row in shared memory, a multiple of what is moved at once.
template <class T>
__host__ __device__ __forceinline__ int64_t padded(int64_t h) {
  return (h + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// Sums of `count` kinds over the rows of a block, for the gradients of what rows are multiplied by and added to: in shared memory
// where that is enough, each thread its own columns, else where they are to end. Null pointers ask for none.
template <class T, int count>
struct BlockSums {
  typedef Wide<T> W;
  static constexpr int n = lanes<T>;
  int64_t h;
  bool staged;
  W* made[count];
  W* held[count];

  static int64_t bytes(int64_t h) { return count * padded<T>(h) * int64_t(sizeof(W)); }

  __device__ __forceinline__ BlockSums(W* const (&partial)[count], int64_t h, bool staged) : h(h), staged(staged) {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      made[k] = partial[k] == nullptr ? nullptr : partial[k] + blockIdx.x * h;
      held[k] = made[k];
      if (staged) held[k] = reinterpret_cast<W*>(stage()) + (int64_t(threadIdx.y) * count + k) * padded<T>(h);
      if (made[k] == nullptr) continue;
      for (int64_t at = threadIdx.x * n; at < h; at += int64_t(blockDim.x) * n) {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          if (at + j < h) held[k][at + j] = 0;
        }
      }
    }
  }

  // What lies behind the sums of all rows.
  __device__ __forceinline__ unsigned char* behind() const { return stage() + blockDim.y * count * padded<T>(h) * sizeof(W); }

  __device__ __forceinline__ void add(int k, const W (&x)[n], int64_t at, int64_t left, bool whole) {
    if (made[k] == nullptr) return;
    W total[n];
    load(total, held[k] + at, left, whole || staged);
#pragma unroll
    for (int j = 0; j < n; ++j) total[j] += x[j];
    keep(held[k] + at, total, left, whole || staged);
  }

  // Every thread of the block comes here.
  __device__ __forceinline__ void finish() {
    if (!staged) return;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < count; ++k) {
      if (made[k] == nullptr) continue;
      const W* all = reinterpret_cast<const W*>(stage()) + k * padded<T>(h);
      for (int64_t at = threadIdx.y * blockDim.x + threadIdx.x; at < h; at += blockDim.x * blockDim.y) {
        W total = 0;
        for (int row = 0; row < blockDim.y; ++row) total += all[int64_t(row) * count * padded<T>(h) + at];
        made[k][at] = total;
      }
    }
  }
};

// On the host: whether so many bytes of each row at a time fit in shared memory, which is then asked for; else a block has one
// row at a time, since its sums are then made where they end.
inline bool stages(Shape& shape, int64_t bytes, int64_t shared) {
  const bool fits = shape.rows * bytes <= shared - exchange_bytes;
  if (fits) {
    shape.shared += shape.rows * bytes;
  } else {
    shape.rows = 1;
  }
  return fits;
}

// A backward has more to do for each element.
inline Shape backward_shape(int64_t width, int n) {
  Shape shape = Shape::of_rows(quotient_up(width, n));
  if (shape.threads > warp) shape.threads = std::min(2 * shape.threads, most_threads);
  return shape;
}

}  // namespace
}  // namespace shardcomp::cuda
