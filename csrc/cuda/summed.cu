// The last step of a norm's backward: the sum over blocks of their partial sums, [blocks, h] in the wide dtype, to [h]. And how
// many rows each block gets.
//
// Partial sums and this second pass replace atomic additions, whose order, and so whose bits, would differ from call to call.

#include "norm.h"

namespace shardcomp::cuda {
namespace {

// A block has 32 columns, so that a warp reads 32 adjacent numbers, and 16 threads for each, since h / 32 blocks of one warp
// would not fill the device.
constexpr int columns = warp, column_threads = 16;

// In float64: the sum over blocks then adds no rounding of its own, and the memory traffic hides the cost.
template <class T>
__global__ void __launch_bounds__(columns* column_threads) summed(const __grid_constant__ Summed a) {
  typedef Wide<T> W;
  double* const totals = reinterpret_cast<double*>(stage());
  const int64_t column = int64_t(blockIdx.x) * columns + threadIdx.x;
  double total = 0;
  if (column < a.width) {
    const W* partial = static_cast<const W*>(a.partial) + column;
#pragma unroll 4
    for (int64_t block = threadIdx.y; block < a.blocks; block += column_threads) total += partial[block * a.width];
  }
  totals[threadIdx.y * columns + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= a.width) return;
  for (int other = 1; other < column_threads; ++other) total += totals[other * columns + threadIdx.x];
  static_cast<T*>(a.sum)[column] = Narrow<T>::of(W(total));
}

}  // namespace

int64_t block_rows(DType dtype, const Rows& rows, int sums, const Device& device) {
  const int64_t size = size_of(dtype), wide = dtype == DType::fp64 ? 8 : 4, vectors = quotient_up(rows.width, 16 / size);
  const int thread_vectors = backward_vectors(sums);
  int64_t block_step = 1, resident = 0;  // rows that a block takes at a time; blocks that run on a multiprocessor at once
  if (size <= most_register_bytes && fits_registers(vectors, thread_vectors)) {
    resident = std::max(1, backward_threads(sums) / register_threads(vectors, thread_vectors));
  } else {
    const Shape shape = backward_shape(rows.width, int(16 / size));
    const int64_t bytes = std::max<int64_t>(1, shape.rows * rows.width * (2 * size + sums * wide));
    block_step = shape.rows;
    resident = std::max<int64_t>(1, std::min<int64_t>(1024 / (shape.threads * shape.rows), device.shared / bytes));
  }
  // As many blocks as run at once, so that none waits for another. But each block writes h sums of 4 bytes, so it should read
  // at least 16 rows for them, as long as every multiprocessor has a block.
  const int64_t most = std::max<int64_t>(device.multiprocessors, rows.count / 16);
  const int64_t share = quotient_up(rows.count, std::min(resident * device.multiprocessors, most));
  return std::max<int64_t>(1, quotient_up(share, block_step)) * block_step;
}

void run(const Summed& a, const Device& device) {
  of_dtype(a.dtype, [&](auto element) {
    typedef decltype(element) T;
    const int64_t shared = exchange_bytes + columns * column_threads * int64_t(sizeof(double));
    const Shape shape{quotient_up(a.width, columns), columns, column_threads, shared};
    start(device, summed<T>, shape, a);
  });
}

}  // namespace shardcomp::cuda
