// Rotary positions of one tensor, forward and backward. A row is the features of one head at one position.
//
// The heads of a position have their tables in common: what a thread has read of these it takes for several heads, whose features
// are all on their way before the first of them are turned.

#include <algorithm>

#include "device.h"

namespace shardcomp::cuda {
namespace {

// Rows with the same tables, so far apart in x and in y. So many threads share them, each of which takes every so-manieth one.
struct Heads {
  int64_t count = 1, of_x = 0, of_y = 0;
  int64_t threads = 1;
};

// Of a thread at most.
constexpr int most_heads = 4;
constexpr int threads = 128;

// On the host: rows become those of one head, the heads being the innermost dimension along which the tables stay as they are.
Heads heads_of(Rows& rows) {
  Heads heads;
  int found = rows.dims - 1;
  while (found >= 0 && (rows.strides[1][found] != 0 || rows.strides[2][found] != 0)) --found;
  if (found < 0) return heads;
  heads = {rows.sizes[found], rows.strides[0][found], rows.strides[3][found], quotient_up(rows.sizes[found], most_heads)};
  --rows.dims;
  rows.count = 1;
  for (int d = 0; d < rows.dims; ++d) {
    if (d >= found) {
      rows.sizes[d] = rows.sizes[d + 1];
      for (auto& strides : rows.strides) strides[d] = strides[d + 1];
    }
    rows.count *= rows.sizes[d];
  }
  return heads;
}

// What a thread does: some features from `at` on, of the heads `first`, `first` + threads and so on.
struct Work {
  int64_t at, first;
  int64_t offset[4];

  __device__ __forceinline__ Work(const Rotary& a, const Heads& heads, int64_t each, int64_t items) {
    at = divided(each, items);
    first = divided(each, heads.threads);
    place(offset, a.rows, each);
    offset[0] += first * heads.of_x;
    offset[3] += first * heads.of_y;
  }
};

// `own` is turned with `other`.
template <class T, class W>
DEVICE W turned(const Rotary& a, W own, W cos, W other, W sin) {
  W straight = own * cos, across = other * sin;
  if (a.round_cos) straight = rounded<T>(straight);
  if (a.round_sin) across = rounded<T>(across);
  return straight + across;
}

// Elements of 16 bytes, those of each pair in each other's place.
template <class T>
DEVICE uint4 swapped(uint4 x) {
  if constexpr (sizeof(T) == 2) {
    return {x.x >> 16 | x.x << 16, x.y >> 16 | x.y << 16, x.z >> 16 | x.z << 16, x.w >> 16 | x.w << 16};
  } else if constexpr (sizeof(T) == 4) {
    return {x.y, x.x, x.w, x.z};
  } else {
    return {x.z, x.w, x.x, x.y};
  }
}

template <class T>
DEVICE void load_table(Wide<T> (&made)[lanes<T>], const Factor& table, int64_t at) {
  if (table.narrow) {
    load(made, static_cast<const T*>(table.held) + at, lanes<T>, true);
  } else {
    load(made, static_cast<const Wide<T>*>(table.held) + at, lanes<T>, true);
  }
}

// Where rows may be moved 16 bytes at a time, and so may either half of what is turned: two vectors of a head, each of which
// is turned with the other, or where pairs are neighbours with itself. What is passed through is copied vector by vector.
template <class T>
__global__ void __launch_bounds__(threads, 5) rotary(const __grid_constant__ Rotary a, const __grid_constant__ Heads heads) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>;
  const int64_t half = a.turned / 2, pairs = half / n, items = pairs + (a.rows.width - a.turned) / n;
  const int64_t x_step = heads.threads * heads.of_x, y_step = heads.threads * heads.of_y, apart = a.interleaved ? n : half;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t each = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; each < items * heads.threads * a.rows.count; each += step) {
    const Work work(a, heads, each, items);
    const bool turns = work.at < pairs;
    const int64_t at = turns ? work.at * n * (a.interleaved ? 2 : 1) : a.turned + (work.at - pairs) * n;
    const T* x = static_cast<const T*>(a.x) + work.offset[0] + at;
    T* y = static_cast<T*>(a.y) + work.offset[3] + at;
    uint4 own[most_heads][2] = {};
#pragma unroll
    for (int k = 0; k < most_heads; ++k) {
      if (work.first + k * heads.threads >= heads.count) continue;
      own[k][0] = fetched(x + k * x_step);
      if (turns) own[k][1] = fetched(x + k * x_step + apart);
    }
    W cos[2][n], sin[2][n];
    if (turns) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        // A backward takes the sines of the features that these are turned with.
        load_table<T>(cos[side], a.cos, work.offset[1] + at + side * apart);
        load_table<T>(sin[side], a.sin, work.offset[2] + at + (a.back && !a.interleaved ? 1 - side : side) * apart);
#pragma unroll
        for (int j = 0; j < n; j += 2) {
          W even = sin[side][j], odd = sin[side][j + 1];
          if (a.interleaved) {
            sin[side][j] = a.back ? odd : -even;
            sin[side][j + 1] = a.back ? -even : odd;
          } else if (a.back == (side == 1)) {
            sin[side][j] = -even;
            sin[side][j + 1] = -odd;
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < most_heads; ++k) {
      if (work.first + k * heads.threads >= heads.count) continue;
      if (!turns) {
        write(reinterpret_cast<uint4*>(y + k * y_step), own[k][0]);
        continue;
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        W v[n], other[n];
        unpack<T>(v, own[k][side]);
        unpack<T>(other, a.interleaved ? swapped<T>(own[k][side]) : own[k][1 - side]);
#pragma unroll
        for (int j = 0; j < n; ++j) v[j] = turned<T>(a, v[j], cos[side][j], other[j], sin[side][j]);
        store(y + k * y_step + side * apart, v, n, true);
      }
    }
  }
}

template <class T>
DEVICE Wide<T> one_of(const Factor& table, int64_t at) {
  return table.narrow ? Wide<T>(widen(static_cast<const T*>(table.held)[at])) : static_cast<const Wide<T>*>(table.held)[at];
}

// Rows of any size, wherever they lie: one feature of each head.
template <class T>
__global__ void __launch_bounds__(threads) rotary_apart(const __grid_constant__ Rotary a, const __grid_constant__ Heads heads) {
  typedef Wide<T> W;
  const int64_t low = a.turned / 2, high = a.turned - low, step = int64_t(gridDim.x) * blockDim.x;
  const int64_t count = a.rows.width * heads.threads * a.rows.count;
  for (int64_t each = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; each < count; each += step) {
    const Work work(a, heads, each, a.rows.width);
    const int64_t at = work.at, partner = a.interleaved ? at ^ 1 : at < low ? at + high : at - low;
    const bool turns = at < a.turned, first = a.interleaved ? at % 2 == 0 : at < low;
    const W cos = turns ? one_of<T>(a.cos, work.offset[1] + at) : W(0);
    W sin = turns ? one_of<T>(a.sin, work.offset[2] + (a.back ? partner : at)) : W(0);
    if (first != a.back) sin = -sin;
    const T* x = static_cast<const T*>(a.x) + work.offset[0];
    T* y = static_cast<T*>(a.y) + work.offset[3];
    for (int64_t head = work.first; head < heads.count; head += heads.threads) {
      y[at] = turns ? Narrow<T>::of(turned<T>(a, W(widen(x[at])), cos, W(widen(x[partner])), sin)) : x[at];
      x += heads.threads * heads.of_x;
      y += heads.threads * heads.of_y;
    }
  }
}

}  // namespace

void run(const Rotary& a, const Device& device) {
  of_dtype(a.dtype, [&](auto held) {
    typedef decltype(held) T;
    constexpr int n = lanes<T>;
    const bool whole = aligned(a.rows, sizeof(T), {a.x, a.cos.held, a.sin.held, a.y}, 4) && a.rows.width % n == 0 &&
                       a.turned % (2 * n) == 0;
    Rotary of_one = a;
    const Heads heads = heads_of(of_one.rows);
    const int64_t items = whole ? (a.rows.width - a.turned / 2) / n : a.rows.width;
    Shape shape{quotient_up(items * heads.threads * of_one.rows.count, threads), threads, 1, 0};
    shape.blocks = std::min(shape.blocks, most_blocks);
    start(device, whole ? rotary<T> : rotary_apart<T>, shape, of_one, heads);
  });
}

}  // namespace shardcomp::cuda
