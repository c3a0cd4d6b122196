// The statistics of a softmax over each row, and the gradient of its cross entropy. Logits are read once for each, and written
// where they lie if that is asked for; nothing is kept beside them.

#include "norm.h"

namespace shardcomp::cuda {
namespace {

// The largest of some numbers that are no NaN, and the sum of the exponentials of what all are below it. As long as the largest
// is -inf there is nothing to add up but NaN.
template <class W>
struct Softmax {
  W largest, total;

  static __device__ __forceinline__ W least() { return -W(INFINITY); }
  static __device__ __forceinline__ W share(W x, W largest) { return exponential(x - (largest == least() ? W(0) : largest)); }

  __device__ __forceinline__ void join(W other_largest, W other_total) {
    const W joint = other_largest > largest ? other_largest : largest;
    total = total * share(largest, joint) + other_total * share(other_largest, joint);
    largest = joint;
  }
};

template <class W>
DEVICE void warp_join(Softmax<W>& made) {
#pragma unroll
  for (int apart = warp / 2; apart > 0; apart /= 2) {
    const W largest = __shfl_xor_sync(0xffffffffu, made.largest, apart);
    const W total = __shfl_xor_sync(0xffffffffu, made.total, apart);
    made.join(largest, total);
  }
}

template <class W>
DEVICE void row_join(Softmax<W>& made) {
  warp_join(made);
  if (alone()) return;
  W* held = exchange<W>();
  const int lane = threadIdx.x % warp, warps = blockDim.x / warp;
  if (lane == 0) {
    held[threadIdx.x / warp * 2] = made.largest;
    held[threadIdx.x / warp * 2 + 1] = made.total;
  }
  __syncthreads();
  made = lane < warps ? Softmax<W>{held[lane * 2], held[lane * 2 + 1]} : Softmax<W>{Softmax<W>::least(), W(0)};
  warp_join(made);
  __syncthreads();  // what was exchanged may be written over
}

// The column of a row's label, or -1 where it is not here.
template <class Arguments>
DEVICE int64_t column_of(const Arguments& a, int64_t row) {
  const int64_t column = a.labels[row] - a.first;
  return a.counted[row] && column >= 0 && column < a.rows.width ? column : -1;
}

template <class T>
__global__ void __launch_bounds__(most_threads) statistics(const __grid_constant__ CrossEntropyStatistics a, bool whole) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>;
  const int64_t width = a.rows.width, step = int64_t(blockDim.x) * n;
  for (int64_t row = first_row(); row < a.rows.count; row += row_step()) {
    int64_t offset[1];
    place(offset, a.rows, row);
    const T* x = static_cast<const T*>(a.logits) + offset[0];
    Softmax<W> made{Softmax<W>::least(), W(0)};
#pragma unroll 2
    for (int64_t at = threadIdx.x * n; at < width; at += step) {
      W v[n];
      load(v, x + at, width - at, whole);
      W here = made.largest;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (at + j < width && v[j] > here) here = v[j];
      }
      if (here > made.largest) made.join(here, W(0));
      const W below = here == Softmax<W>::least() ? W(0) : here;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (at + j < width) made.total += exponential(v[j] - below);
      }
    }
    row_join(made);
    if (made.total != made.total) {  // in every thread of the row
      W any[1] = {};
      for (int64_t at = threadIdx.x; at < width; at += blockDim.x) {
        const W v = widen(x[at]);
        if (v != v) any[0] = 1;
      }
      row_sum(any);
      if (any[0] > 0) made.largest = made.total;
    }
    if (threadIdx.x == 0) {
      const int64_t column = column_of(a, row);
      W* statistics = static_cast<W*>(a.statistics) + row;
      statistics[0] = made.largest;
      statistics[a.rows.count] = made.total;
      statistics[2 * a.rows.count] = column < 0 ? W(0) : W(widen(x[column]));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(most_threads) gradient(const __grid_constant__ CrossEntropyGradient a, bool whole) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>;
  const int64_t width = a.rows.width, step = int64_t(blockDim.x) * n;
  const W* normaliser = static_cast<const W*>(a.normaliser);
  for (int64_t row = first_row(); row < a.rows.count; row += row_step()) {
    int64_t offset[2];
    place(offset, a.rows, row);
    const T* x = static_cast<const T*>(a.logits) + offset[0];
    T* y = static_cast<T*>(a.gradient) + offset[1];
    const bool counted = a.counted[row];
    const W largest = normaliser[row], share = W(1) / normaliser[a.rows.count + row], scale = static_cast<const W*>(a.scale)[row];
    const int64_t column = column_of(a, row);
#pragma unroll 2
    for (int64_t at = threadIdx.x * n; at < width; at += step) {
      W v[n] = {};
      if (counted) {
        load(v, x + at, width - at, whole);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          v[j] = exponential(v[j] - largest) * share;
          v[j] = (at + j == column ? v[j] - W(1) : v[j]) * scale;
        }
      }
      store(y + at, v, width - at, whole);
    }
  }
}

template <class T>
Shape rows_shape(const Rows& rows) {
  Shape shape = Shape::of_rows(quotient_up(rows.width, lanes<T>));
  shape.blocks = std::min(quotient_up(rows.count, shape.rows), most_blocks);
  return shape;
}

}  // namespace

void run(const CrossEntropyStatistics& a, const Device& device) {
  of_dtype(a.dtype, [&](auto held) {
    typedef decltype(held) T;
    start(device, statistics<T>, rows_shape<T>(a.rows), a, aligned(a.rows, sizeof(T), {a.logits}, 1));
  });
}

void run(const CrossEntropyGradient& a, const Device& device) {
  of_dtype(a.dtype, [&](auto held) {
    typedef decltype(held) T;
    start(device, gradient<T>, rows_shape<T>(a.rows), a, aligned(a.rows, sizeof(T), {a.logits, a.gradient}, 2));
  });
}

}  // namespace shardcomp::cuda
