// Rotary position embedding (Su et al., https://arxiv.org/abs/2104.09864) of one tensor, forward and backward. A row is the
// features of one head at one position: x is [.., d], the tables are [.., rotated] and broadcast to it.
//
//   y = x · cos + rotate_half(x) · sin, where rotate_half pairs feature i with i + rotated / 2, or neighbours if `interleaved`
//
// The backward is the transpose: the same kernel with the sines of the partner, negated on the other side. It needs the tables
// and nothing else. Memory traffic for an element: 1 read and 1 write, and the tables, which the heads of a position share: a
// thread reads its part of them once and applies it to up to 4 heads, whose loads are all in flight before the first is used.
//
// Numerics: `round_cos` and `round_sin` round each product to T before the sum, as a model whose tables are in T does; else one
// rounding at the end. No fused multiply-add: the reference rounds the products.

#include <algorithm>

#include "device.h"

namespace shardcomp::cuda {
namespace {

// The heads of one position: `count` rows with the same tables, of_x and of_y elements apart in x and y. `threads` threads
// share the heads; each takes every `threads`-th one.
struct Heads {
  int64_t count = 1, of_x = 0, of_y = 0;
  int64_t threads = 1;
};

// The heads of one thread at most: their vectors and the tables must fit in its registers.
constexpr int most_heads = 4;
constexpr int threads = 128;

// On the host: takes the heads out of the rows. They are the innermost dimension that both tables broadcast (stride 0).
Heads heads_of(Rows& rows) {
  Heads heads;
  int dim = rows.dims - 1;
  while (dim >= 0 && (rows.strides[1][dim] != 0 || rows.strides[2][dim] != 0)) --dim;
  if (dim < 0) return heads;
  heads = {rows.sizes[dim], rows.strides[0][dim], rows.strides[3][dim], quotient_up(rows.sizes[dim], most_heads)};
  --rows.dims;
  rows.count = 1;
  for (int d = 0; d < rows.dims; ++d) {
    if (d >= dim) {
      rows.sizes[d] = rows.sizes[d + 1];
      for (auto& strides : rows.strides) strides[d] = strides[d + 1];
    }
    rows.count *= rows.sizes[d];
  }
  return heads;
}

// The work of a thread: an item `at` of a row, for the heads `first`, `first` + threads and so on. Items vary fastest over
// threads, so that a warp reads neighbouring vectors.
struct Work {
  int64_t at, first;
  int64_t offset[4];

  __device__ __forceinline__ Work(const Rotary& a, const Heads& heads, int64_t index, int64_t items) {
    at = divided(index, items);
    first = divided(index, heads.threads);
    row_offsets(offset, a.rows, index);
    offset[0] += first * heads.of_x;
    offset[3] += first * heads.of_y;
  }
};

// One feature of the result, from the feature itself and its partner; `sin` already has its sign.
template <class T, class W>
DEVICE W rotated(const Rotary& a, W own, W cos, W other, W sin) {
  W straight = own * cos, across = other * sin;
  if (a.round_cos) straight = rounded<T>(straight);
  if (a.round_sin) across = rounded<T>(across);
  return straight + across;
}

// The elements of 16 bytes with the two of each pair swapped.
template <class T>
DEVICE uint4 swap_pairs(uint4 x) {
  if constexpr (sizeof(T) == 2) {
    return {x.x >> 16 | x.x << 16, x.y >> 16 | x.y << 16, x.z >> 16 | x.z << 16, x.w >> 16 | x.w << 16};
  } else if constexpr (sizeof(T) == 4) {
    return {x.y, x.x, x.w, x.z};
  } else {
    return {x.z, x.w, x.x, x.y};
  }
}

template <class T>
DEVICE void load_table(Wide<T> (&values)[lanes<T>], const Factor& table, int64_t at) {
  if (table.narrow) {
    load(values, static_cast<const T*>(table.values) + at, lanes<T>, true);
  } else {
    load(values, static_cast<const Wide<T>*>(table.values) + at, lanes<T>, true);
  }
}

// Rows and both of their halves are whole, aligned vectors. An item is two vectors of a head: the partners of each other, or
// with `interleaved` two neighbours that have their partners inside. Both results come from one read of both. Features that are
// not rotated are copied, a vector for each item.
//
// Launch bounds of 5 blocks of 128 threads leave about 100 registers: 32 for the vectors of 4 heads, 32 for the tables in bf16.
template <class T>
__global__ void __launch_bounds__(threads, 5) rotary(const __grid_constant__ Rotary a, const __grid_constant__ Heads heads) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>;
  const int64_t half = a.rotated / 2, pairs = half / n, items = pairs + (a.rows.width - a.rotated) / n;
  const int64_t x_step = heads.threads * heads.of_x, y_step = heads.threads * heads.of_y, distance = a.interleaved ? n : half;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; index < items * heads.threads * a.rows.count;
       index += step) {
    const Work work(a, heads, index, items);
    const bool rotates = work.at < pairs;
    const int64_t at = rotates ? work.at * n * (a.interleaved ? 2 : 1) : a.rotated + (work.at - pairs) * n;
    const T* x = static_cast<const T*>(a.x) + work.offset[0] + at;
    T* y = static_cast<T*>(a.y) + work.offset[3] + at;
    uint4 own[most_heads][2] = {};
#pragma unroll
    for (int k = 0; k < most_heads; ++k) {
      if (work.first + k * heads.threads >= heads.count) continue;
      own[k][0] = fetched(x + k * x_step);
      if (rotates) own[k][1] = fetched(x + k * x_step + distance);
    }
    W cos[2][n], sin[2][n];
    if (rotates) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        // The transpose has the sine of the partner; in halves, that is the other vector.
        load_table<T>(cos[side], a.cos, work.offset[1] + at + side * distance);
        load_table<T>(sin[side], a.sin, work.offset[2] + at + (a.backward && !a.interleaved ? 1 - side : side) * distance);
#pragma unroll
        for (int j = 0; j < n; j += 2) {
          W even = sin[side][j], odd = sin[side][j + 1];
          if (a.interleaved) {
            sin[side][j] = a.backward ? odd : -even;
            sin[side][j + 1] = a.backward ? -even : odd;
          } else if (a.backward == (side == 1)) {
            sin[side][j] = -even;
            sin[side][j + 1] = -odd;
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < most_heads; ++k) {
      if (work.first + k * heads.threads >= heads.count) continue;
      if (!rotates) {
        write(reinterpret_cast<uint4*>(y + k * y_step), own[k][0]);
        continue;
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        W v[n], other[n];
        unpack<T>(v, own[k][side]);
        unpack<T>(other, a.interleaved ? swap_pairs<T>(own[k][side]) : own[k][1 - side]);
#pragma unroll
        for (int j = 0; j < n; ++j) v[j] = rotated<T>(a, v[j], cos[side][j], other[j], sin[side][j]);
        store(y + k * y_step + side * distance, v, n, true);
      }
    }
  }
}

template <class T>
DEVICE Wide<T> table_value(const Factor& table, int64_t at) {
  return table.narrow ? Wide<T>(widen(static_cast<const T*>(table.values)[at])) : static_cast<const Wide<T>*>(table.values)[at];
}

// Any width, alignment and odd halves: an item is one feature, and its partner is read again by another thread.
template <class T>
__global__ void __launch_bounds__(threads) rotary_apart(const __grid_constant__ Rotary a, const __grid_constant__ Heads heads) {
  typedef Wide<T> W;
  const int64_t low = a.rotated / 2, high = a.rotated - low, step = int64_t(gridDim.x) * blockDim.x;
  const int64_t count = a.rows.width * heads.threads * a.rows.count;
  for (int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; index < count; index += step) {
    const Work work(a, heads, index, a.rows.width);
    const int64_t at = work.at, partner = a.interleaved ? at ^ 1 : at < low ? at + high : at - low;
    const bool rotates = at < a.rotated, first = a.interleaved ? at % 2 == 0 : at < low;
    const W cos = rotates ? table_value<T>(a.cos, work.offset[1] + at) : W(0);
    W sin = rotates ? table_value<T>(a.sin, work.offset[2] + (a.backward ? partner : at)) : W(0);
    if (first != a.backward) sin = -sin;
    const T* x = static_cast<const T*>(a.x) + work.offset[0];
    T* y = static_cast<T*>(a.y) + work.offset[3];
    for (int64_t head = work.first; head < heads.count; head += heads.threads) {
      y[at] = rotates ? Narrow<T>::of(rotated<T>(a, W(widen(x[at])), cos, W(widen(x[partner])), sin)) : x[at];
      x += heads.threads * heads.of_x;
      y += heads.threads * heads.of_y;
    }
  }
}

}  // namespace

void run(const Rotary& a, const Device& device) {
  of_dtype(a.dtype, [&](auto element) {
    typedef decltype(element) T;
    constexpr int n = lanes<T>;
    const bool vectorized = aligned(a.rows, sizeof(T), {a.x, a.cos.values, a.sin.values, a.y}, 4) && a.rows.width % n == 0 &&
                       a.rotated % (2 * n) == 0;
    Rotary head_args = a;
    const Heads heads = heads_of(head_args.rows);
    const int64_t items = vectorized ? (a.rows.width - a.rotated / 2) / n : a.rows.width;
    Shape shape{quotient_up(items * heads.threads * head_args.rows.count, threads), threads, 1, 0};
    shape.blocks = std::min(shape.blocks, most_blocks);
    start(device, vectorized ? rotary<T> : rotary_apart<T>, shape, head_args, heads);
  });
}

}  // namespace shardcomp::cuda
