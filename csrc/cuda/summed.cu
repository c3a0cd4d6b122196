// How the rows of a norm's backward are shared out to blocks, and the sum over blocks that ends it.

#include "norm.h"

namespace shardcomp::cuda {
namespace {

// Columns of a block, and threads that share the sum of each.
constexpr int columns = warp, parts = 16;

// In float64, so that what blocks leave behind is as good as if one had made the sum.
template <class T>
__global__ void __launch_bounds__(columns* parts) summed(const __grid_constant__ Summed a) {
  typedef Wide<T> W;
  double* const held = reinterpret_cast<double*>(stage());
  const int64_t column = int64_t(blockIdx.x) * columns + threadIdx.x;
  double total = 0;
  if (column < a.width) {
    const W* partial = static_cast<const W*>(a.partial) + column;
#pragma unroll 4
    for (int64_t block = threadIdx.y; block < a.blocks; block += parts) total += partial[block * a.width];
  }
  held[threadIdx.y * columns + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= a.width) return;
  for (int part = 1; part < parts; ++part) total += held[part * columns + threadIdx.x];
  static_cast<T*>(a.sum)[column] = Narrow<T>::of(W(total));
}

}  // namespace

int64_t block_rows(DType dtype, const Rows& rows, int sums, const Device& device) {
  const int64_t size = size_of(dtype), wide = dtype == DType::fp64 ? 8 : 4, vectors = quotient_up(rows.width, 16 / size);
  const int held = held_back(sums);
  int64_t each = 1, resident = 0;  // rows of a block at a time, and blocks of a multiprocessor
  if (size <= most_held_bytes && holds(vectors, held)) {
    resident = std::max(1, held_threads(sums) / holding_threads(vectors, held));
  } else {
    const Shape shape = backward_shape(rows.width, int(16 / size));
    const int64_t bytes = std::max<int64_t>(1, shape.rows * rows.width * (2 * size + sums * wide));
    each = shape.rows;
    resident = std::max<int64_t>(1, std::min<int64_t>(1024 / (shape.threads * shape.rows), device.shared / bytes));
  }
  // As many as the device runs at a time, but so few that what they leave behind is little beside what they read.
  const int64_t most = std::max<int64_t>(device.multiprocessors, rows.count / 16);
  const int64_t share = quotient_up(rows.count, std::min(resident * device.multiprocessors, most));
  return std::max<int64_t>(1, quotient_up(share, each)) * each;
}

void run(const Summed& a, const Device& device) {
  of_dtype(a.dtype, [&](auto held) {
    typedef decltype(held) T;
    const Shape shape{quotient_up(a.width, columns), columns, parts, exchange_bytes + columns * parts * int64_t(sizeof(double))};
    start(device, summed<T>, shape, a);
  });
}

}  // namespace shardcomp::cuda
