// The statistics of a softmax over each row, and the gradient of its cross entropy. Logits are read once for each, and written
// where they lie if that is asked for; nothing is kept beside them.

#include "norm.h"

namespace shardcomp::cuda {
namespace {

DEVICE float greater(float x, float y) { return fmaxf(x, y); }
DEVICE double greater(double x, double y) { return fmax(x, y); }

// e to the power of x to about 22 bits, for what is added up or rounded to fewer; zero where float has no normal number for it.
DEVICE float short_exponential(float x) {
  const float power = x * 1.44269504088896340736f;
#if defined(__CUDA_ARCH__)
  float made;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(made) : "f"(power));
  return made;
#else
  return exp2f(power);
#endif
}
DEVICE double short_exponential(double x) { return exp(x); }

// The largest of some numbers that are no NaN, and the sum of the exponentials of what all are below it. As long as the largest
// is -inf there is nothing to add up but NaN.
template <class W>
struct Softmax {
  W largest = least(), total = 0;

  static __device__ __forceinline__ W least() { return -W(INFINITY); }

  // As if `joint`, which is no less, had been the largest one.
  __device__ __forceinline__ void raise(W joint) {
    total *= short_exponential(largest - (joint == least() ? W(0) : joint));
    largest = joint;
  }

  template <int count, int n>
  __device__ __forceinline__ void add(const W (&x)[count][n]) {
    W joint = largest;
#pragma unroll
    for (int j = 0; j < count * n; ++j) joint = greater(joint, x[j / n][j % n]);
    raise(joint);
    const W zero = joint == least() ? W(0) : joint;
    W sums[4] = {};
#pragma unroll
    for (int j = 0; j < count * n; ++j) sums[j % 4] += short_exponential(x[j / n][j % n] - zero);
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

template <class W>
DEVICE void warp_join(Softmax<W>& made) {
  W joint = made.largest;
#pragma unroll
  for (int apart = warp / 2; apart > 0; apart /= 2) joint = greater(joint, __shfl_xor_sync(0xffffffffu, joint, apart));
  made.raise(joint);
  W total[1] = {made.total};
  warp_sum(total);
  made.total = total[0];
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
  made = Softmax<W>();
  if (lane < warps) made.largest = held[lane * 2], made.total = held[lane * 2 + 1];
  warp_join(made);
  __syncthreads();  // what was exchanged may be written over
}

// 16 bytes of -inf.
template <class T>
DEVICE uint4 least_word() {
  if constexpr (std::is_same_v<T, double>) return {0, 0xfff00000u, 0, 0xfff00000u};
  const uint32_t each = std::is_same_v<T, float> ? 0xff800000u : std::is_same_v<T, bf16> ? 0xff80ff80u : 0xfc00fc00u;
  return {each, each, each, each};
}

// A row in memory: so many elements until 16 bytes are aligned, then so many vectors, and again some elements.
template <class T>
struct Parts {
  int64_t before, vectors, apart;  // those that are in no vector

  __device__ __forceinline__ Parts(const T* x, int64_t width, bool in_vectors = true) {
    constexpr int n = lanes<T>;
    before = in_vectors ? (16 - int(reinterpret_cast<uintptr_t>(x) % 16)) % 16 / int(sizeof(T)) : width;
    if (before > width) before = width;
    vectors = (width - before) / n;
    apart = width - vectors * n;
  }
  __device__ __forceinline__ int64_t vector(int64_t at) const { return before + at * lanes<T>; }
  __device__ __forceinline__ int64_t one_apart(int64_t at) const { return at < before ? at : at + vectors * lanes<T>; }
};

// The column of a row's label, or -1 where it is not here.
template <class Arguments>
DEVICE int64_t column_of(const Arguments& a, int64_t row) {
  const int64_t column = a.labels[row] - a.first;
  return a.counted[row] && column >= 0 && column < a.rows.width ? column : -1;
}

template <class T>
__global__ void __launch_bounds__(most_threads, sizeof(T) == 8 ? 1 : 2)
    statistics(const __grid_constant__ CrossEntropyStatistics a) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>, ahead = 4;  // vectors that are on their way at once
  const int64_t width = a.rows.width;
  const int step = blockDim.x;
  for (int64_t row = first_row(); row < a.rows.count; row += row_step()) {
    int64_t offset[1];
    place(offset, a.rows, row);
    const T* x = static_cast<const T*>(a.logits) + offset[0];
    const Parts<T> parts(x, width);
    const int64_t column = column_of(a, row);
    Softmax<W> made;
    const T* from = x + parts.vector(threadIdx.x);
    for (int64_t left = parts.vectors - threadIdx.x; left > 0; left -= ahead * step, from += ahead * step * n) {
      uint4 words[ahead];
#pragma unroll
      for (int k = 0; k < ahead; ++k) words[k] = left > k * step ? fetched(from + k * step * n) : least_word<T>();
      W v[ahead][n];
#pragma unroll
      for (int k = 0; k < ahead; ++k) unpack<T>(v[k], words[k]);
      made.add(v);
    }
    for (int64_t at = threadIdx.x; at < parts.apart; at += step) {
      const W v[1][1] = {{widen(x[parts.one_apart(at)])}};
      made.add(v);
    }
    const W chosen = column < 0 ? W(0) : W(widen(x[column]));
    row_join(made);
    if (made.total != made.total) {  // in every thread of the row
      W any[1] = {};
      for (int64_t at = threadIdx.x; at < width; at += step) {
        const W v = widen(x[at]);
        if (v != v) any[0] = 1;
      }
      row_sum(any);
      if (any[0] > 0) made.largest = made.total;
    }
    if (threadIdx.x == 0) {
      W* statistics = static_cast<W*>(a.statistics) + row;
      statistics[0] = made.largest;
      statistics[a.rows.count] = made.total;
      statistics[2 * a.rows.count] = chosen;
    }
  }
}

// Of a row's gradient, that of some neighbours, the first of them at `at`, which are written over.
template <class T>
struct RowGradient {
  typedef Wide<T> W;
  W largest, share, scale;
  int64_t column;

  template <int count>
  __device__ __forceinline__ void make(W (&x)[count], int64_t at) const {
#pragma unroll
    for (int j = 0; j < count; ++j) {
      const W below = x[j] - largest;
      x[j] = (sizeof(T) == 2 ? short_exponential(below) : exponential(below)) * share;
    }
    const int64_t there = column - at;
    if (there >= 0 && there < count) {
#pragma unroll
      for (int j = 0; j < count; ++j) x[j] -= j == int(there) ? W(1) : W(0);
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
    place(offset, a.rows, row);
    const T* x = static_cast<const T*>(a.logits) + offset[0];
    T* y = static_cast<T*>(a.gradient) + offset[1];
    const Parts<T> parts(x, width, (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(y)) % 16 == 0);
    const bool counted = a.counted[row];
    const RowGradient<T> made{normaliser[row], W(1) / normaliser[a.rows.count + row], static_cast<const W*>(a.scale)[row],
                              column_of(a, row)};
    for (int64_t at = threadIdx.x; at < parts.vectors; at += ahead * step) {
      uint4 words[ahead];
#pragma unroll
      for (int k = 0; k < ahead; ++k) {
        if (counted && at + k * step < parts.vectors) words[k] = fetched(x + parts.vector(at + k * step));
      }
#pragma unroll
      for (int k = 0; k < ahead; ++k) {
        if (at + k * step >= parts.vectors) continue;
        W v[n] = {};
        if (counted) {
          unpack<T>(v, words[k]);
          made.make(v, parts.vector(at + k * step));
        }
        store(y + parts.vector(at + k * step), v, n, true);
      }
    }
    for (int64_t each = threadIdx.x; each < parts.apart; each += step) {
      const int64_t at = parts.one_apart(each);
      W v[1] = {};
      if (counted) {
        v[0] = widen(x[at]);
        made.make(v, at);
      }
      y[at] = Narrow<T>::of(v[0]);
    }
  }
}

// As many threads as find several times as many vectors as are on their way.
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
  of_dtype(a.dtype, [&](auto held) {
    typedef decltype(held) T;
    start(device, statistics<T>, rows_shape<T>(a.rows), a);
  });
}

void run(const CrossEntropyGradient& a, const Device& device) {
  of_dtype(a.dtype, [&](auto held) {
    typedef decltype(held) T;
    start(device, gradient<T>, rows_shape<T>(a.rows), a);
  });
}

}  // namespace shardcomp::cuda
