// Cross entropy of logits [rows, columns] in two kernels: statistics of a softmax over each row, and the gradient of the
// logits.
//
//   statistics:  m = max(x), s = Σ exp(x - m), and the label's logit; the loss is log(s) + m - x[label]
//   gradient:    (exp(x - m) / s - [column is the label]) · scale, zero for rows that do not count
//
// m and s stay separate because a rank of a split vocabulary has only some columns: the ranks exchange three numbers for each
// row, and the second kernel gets the m and s of all of them.
//
// Memory traffic for an element: 1 read for the statistics, 1 read and 1 write for the gradient, which may overwrite the
// logits. Logits of a large vocabulary are the largest tensor of a step, so no float32 copy and no softmax is ever written. The
// maximum and the sum take one pass (online softmax: Milakov and Gimelshein, https://arxiv.org/abs/1805.02867).
//
// Arithmetic is in float32, or float64 for such logits. The sum is in a fixed order and follows the reference to rounding, not
// to the bit, as does the approximate exp.

#include "norm.h"

namespace shardcomp::cuda {
namespace {

DEVICE float greater(float x, float y) { return fmaxf(x, y); }
DEVICE double greater(double x, double y) { return fmax(x, y); }

// eˣ to about 22 bits, in two instructions; zero where it is subnormal. It serves terms of a long sum and results that are
// rounded to 16 bits.
DEVICE float short_exponential(float x) {
  const float power = x * 1.44269504088896340736f;
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(power));
  return result;
#else
  return exp2f(power);
#endif
}
DEVICE double short_exponential(double x) { return exp(x); }

// A running maximum m, which skips NaN, and the running sum of exp(x - m). While m is -inf, x - m would be NaN for x = -inf, so
// zero replaces m: the exponentials are then zero, except for a NaN, which enters the sum.
template <class W>
struct Softmax {
  W largest = lowest(), total = 0;

  static __device__ __forceinline__ W lowest() { return -W(INFINITY); }

  // Rescales the sum to the maximum `joint`, which is no less than the old one.
  __device__ __forceinline__ void raise(W joint) {
    total *= short_exponential(largest - (joint == lowest() ? W(0) : joint));
    largest = joint;
  }

  template <int count, int n>
  __device__ __forceinline__ void add(const W (&x)[count][n]) {
    W joint = largest;
#pragma unroll
    for (int j = 0; j < count * n; ++j) joint = greater(joint, x[j / n][j % n]);
    raise(joint);
    const W zero = joint == lowest() ? W(0) : joint;
    W sums[4] = {};  // four independent chains of additions
#pragma unroll
    for (int j = 0; j < count * n; ++j) sums[j % 4] += short_exponential(x[j / n][j % n] - zero);
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

// Joins the softmax of all threads of a row, which all get: first the maximum, so that each thread rescales its sum once.
template <class W>
DEVICE void warp_join(Softmax<W>& softmax) {
  W joint = softmax.largest;
#pragma unroll
  for (int distance = warp / 2; distance > 0; distance /= 2) joint = greater(joint, __shfl_xor_sync(0xffffffffu, joint, distance));
  softmax.raise(joint);
  W total[1] = {softmax.total};
  warp_sum(total);
  softmax.total = total[0];
}

template <class W>
DEVICE void row_join(Softmax<W>& softmax) {
  warp_join(softmax);
  if (alone()) return;
  W* slots = exchange<W>();
  const int lane = threadIdx.x % warp, warps = blockDim.x / warp;
  if (lane == 0) {
    slots[threadIdx.x / warp * 2] = softmax.largest;
    slots[threadIdx.x / warp * 2 + 1] = softmax.total;
  }
  __syncthreads();
  softmax = Softmax<W>();
  if (lane < warps) softmax.largest = slots[lane * 2], softmax.total = slots[lane * 2 + 1];
  warp_join(softmax);
  __syncthreads();  // all have read: the next row may overwrite the exchange
}

// 16 bytes of -inf, which add nothing: a stand-in for vectors past the end.
template <class T>
DEVICE uint4 lowest_word() {
  if constexpr (std::is_same_v<T, double>) return {0, 0xfff00000u, 0, 0xfff00000u};
  const uint32_t word = std::is_same_v<T, float> ? 0xff800000u : std::is_same_v<T, bf16> ? 0xff80ff80u : 0xfc00fc00u;
  return {word, word, word, word};
}

// A row in memory: `head` elements up to the first multiple of 16 bytes, then `vectors`, then the rest. An odd vocabulary such
// as GPT-2's 50257 shifts every row against the last one, so alignment is found for each row. in_vectors: false has no vectors.
template <class T>
struct RowSpan {
  int64_t head, vectors, scalars;  // scalars: the elements of head and tail

  __device__ __forceinline__ RowSpan(const T* x, int64_t width, bool in_vectors = true) {
    constexpr int n = lanes<T>;
    head = in_vectors ? (16 - int(reinterpret_cast<uintptr_t>(x) % 16)) % 16 / int(sizeof(T)) : width;
    if (head > width) head = width;
    vectors = (width - head) / n;
    scalars = width - vectors * n;
  }
  __device__ __forceinline__ int64_t vector(int64_t at) const { return head + at * lanes<T>; }
  __device__ __forceinline__ int64_t scalar(int64_t at) const { return at < head ? at : at + vectors * lanes<T>; }
};

// The column of a row's label, or -1 if another rank has it or the row does not count.
template <class Arguments>
DEVICE int64_t column_of(const Arguments& a, int64_t row) {
  const int64_t column = a.labels[row] - a.first;
  return a.counted[row] && column >= 0 && column < a.rows.width ? column : -1;
}

template <class T>
__global__ void __launch_bounds__(most_threads, sizeof(T) == 8 ? 1 : 2)
    statistics(const __grid_constant__ CrossEntropyStatistics a) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>, ahead = 4;  // vectors that a thread has in flight
  const int64_t width = a.rows.width;
  const int step = blockDim.x;
  for (int64_t row = first_row(); row < a.rows.count; row += row_step()) {
    int64_t offset[1];
    row_offsets(offset, a.rows, row);
    const T* x = static_cast<const T*>(a.logits) + offset[0];
    const RowSpan<T> span(x, width);
    const int64_t column = column_of(a, row);
    Softmax<W> softmax;
    const T* from = x + span.vector(threadIdx.x);
    for (int64_t left = span.vectors - threadIdx.x; left > 0; left -= ahead * step, from += ahead * step * n) {
      uint4 words[ahead];
#pragma unroll
      for (int k = 0; k < ahead; ++k) words[k] = left > k * step ? fetched(from + k * step * n) : lowest_word<T>();
      W v[ahead][n];
#pragma unroll
      for (int k = 0; k < ahead; ++k) unpack<T>(v[k], words[k]);
      softmax.add(v);
    }
    for (int64_t at = threadIdx.x; at < span.scalars; at += step) {
      const W v[1][1] = {{widen(x[span.scalar(at)])}};
      softmax.add(v);
    }
    const W chosen = column < 0 ? W(0) : W(widen(x[column]));
    row_join(softmax);
    // A NaN total comes from a NaN logit or from an infinite one. Only the first makes the maximum NaN, as in the reference.
    // The second look at the row is rare, and all threads of the row take it together, since they have one total.
    if (softmax.total != softmax.total) {
      W any[1] = {};
      for (int64_t at = threadIdx.x; at < width; at += step) {
        const W v = widen(x[at]);
        if (v != v) any[0] = 1;
      }
      row_sum(any);
      if (any[0] > 0) softmax.largest = softmax.total;
    }
    if (threadIdx.x == 0) {
      W* statistics = static_cast<W*>(a.statistics) + row;
      statistics[0] = softmax.largest;
      statistics[a.rows.count] = softmax.total;
      statistics[2 * a.rows.count] = chosen;
    }
  }
}

// The gradient of a row. `overwrite` turns logits from column `at` on into their gradient.
template <class T>
struct RowGradient {
  typedef Wide<T> W;
  W largest, share, scale;
  int64_t column;

  template <int count>
  __device__ __forceinline__ void overwrite(W (&x)[count], int64_t at) const {
#pragma unroll
    for (int j = 0; j < count; ++j) {
      const W below = x[j] - largest;
      x[j] = (sizeof(T) == 2 ? short_exponential(below) : exponential(below)) * share;
    }
    const int64_t label = column - at;
    if (label >= 0 && label < count) {
#pragma unroll
      for (int j = 0; j < count; ++j) x[j] -= j == int(label) ? W(1) : W(0);
    }
#pragma unroll
    for (int j = 0; j < count; ++j) x[j] *= scale;
  }
};

template <class T>
__global__ void __launch_bounds__(most_threads) gradient(const __grid_constant__ CrossEntropyGradient a) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>, ahead = sizeof(T) == 8 ? 1 : 2;
  const int64_t width = a.rows.width, step = blockDim.x;
  const W* normaliser = static_cast<const W*>(a.normaliser);
  for (int64_t row = first_row(); row < a.rows.count; row += row_step()) {
    int64_t offset[2];
    row_offsets(offset, a.rows, row);
    const T* x = static_cast<const T*>(a.logits) + offset[0];
    T* y = static_cast<T*>(a.gradient) + offset[1];
    // Logits and gradient share the vectors only where they are misaligned alike.
    const RowSpan<T> span(x, width, (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(y)) % 16 == 0);
    const bool counted = a.counted[row];
    const RowGradient<T> row_gradient{normaliser[row], W(1) / normaliser[a.rows.count + row], static_cast<const W*>(a.scale)[row],
                              column_of(a, row)};
    for (int64_t at = threadIdx.x; at < span.vectors; at += ahead * step) {
      uint4 words[ahead];
#pragma unroll
      for (int k = 0; k < ahead; ++k) {
        // Rows that do not count are not read, only zeroed: padding costs half.
        if (counted && at + k * step < span.vectors) words[k] = fetched(x + span.vector(at + k * step));
      }
#pragma unroll
      for (int k = 0; k < ahead; ++k) {
        if (at + k * step >= span.vectors) continue;
        W v[n] = {};
        if (counted) {
          unpack<T>(v, words[k]);
          row_gradient.overwrite(v, span.vector(at + k * step));
        }
        store(y + span.vector(at + k * step), v, n, true);
      }
    }
    for (int64_t index = threadIdx.x; index < span.scalars; index += step) {
      const int64_t at = span.scalar(index);
      W v[1] = {};
      if (counted) {
        v[0] = widen(x[at]);
        row_gradient.overwrite(v, at);
      }
      y[at] = Narrow<T>::of(v[0]);
    }
  }
}

// So many threads that each has several rounds of `ahead` vectors; short rows get a warp each, four in a block.
template <class T>
Shape rows_shape(const Rows& rows) {
  const int64_t vectors = quotient_up(rows.width, lanes<T>);
  Shape shape{0, vectors <= 4 * warp ? warp : vectors <= 1024 ? 128 : vectors <= 8192 ? 256 : most_threads, 1, exchange_bytes};
  if (shape.threads == warp) shape.rows = 4;
  shape.blocks = std::min(quotient_up(rows.count, shape.rows), most_blocks);
  return shape;
}

}  // namespace

void run(const CrossEntropyStatistics& a, const Device& device) {
  of_dtype(a.dtype, [&](auto element) {
    typedef decltype(element) T;
    start(device, statistics<T>, rows_shape<T>(a.rows), a);
  });
}

void run(const CrossEntropyGradient& a, const Device& device) {
  of_dtype(a.dtype, [&](auto element) {
    typedef decltype(element) T;
    start(device, gradient<T>, rows_shape<T>(a.rows), a);
  });
}

}  // namespace shardcomp::cuda
