// RMS norm, with or without a residual addition before it, and the backward of both.

#include "norm.h"

namespace shardcomp::cuda {
namespace {

// A row is read from memory once: what it is made of stays in shared memory where it fits (`staged`), else it is read again.
// Each thread reads what it has written itself, so that nothing is waited for.
template <class T>
__global__ void __launch_bounds__(most_threads, 1) rms_norm(const __grid_constant__ RmsNorm a, bool whole, bool staged) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>;
  const int64_t h = a.rows.width, step = int64_t(blockDim.x) * n;
  const T* const residuals = static_cast<const T*>(a.residual);
  for (int64_t row = first_row(); row < a.rows.count; row += row_step()) {
    int64_t offset[2];
    place(offset, a.rows, row);
    const T* x = static_cast<const T*>(a.x) + offset[0];
    T* total = static_cast<T*>(a.total) + row * h;
    T* kept = staged ? reinterpret_cast<T*>(stage()) + threadIdx.y * padded<T>(h) : nullptr;
    W squares[1] = {};
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W v[n];
      load(v, x + at, h - at, whole);
      if (residuals != nullptr) {
        W r[n];
        load(r, residuals + offset[1] + at, h - at, whole);
#pragma unroll
        for (int j = 0; j < n; ++j) v[j] = rounded<T>(v[j] + r[j]);
        store(total + at, v, h - at, whole);
      }
      if (staged) keep(kept + at, v);
#pragma unroll
      for (int j = 0; j < n; ++j) squares[0] += v[j] * v[j];
    }
    row_sum(squares);
    const W rstd = root_of_row<T>(squares[0] / W(h) + W(a.eps));
    if (threadIdx.x == 0) static_cast<W*>(a.rstd)[row] = rstd;
    const T* again = staged ? kept : residuals != nullptr ? total : x;
    T* y = static_cast<T*>(a.y) + row * h;
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W v[n];
      load(v, again + at, staged ? n : h - at, whole || staged);
#pragma unroll
      for (int j = 0; j < n; ++j) v[j] *= rstd;
      if (a.factor.held != nullptr) {
        W f[n];
        load_factor<T>(f, a.factor, at, h - at, whole);
#pragma unroll
        for (int j = 0; j < n; ++j) v[j] = (a.round_first ? rounded<T>(v[j]) : v[j]) * f[j];
      }
      store(y + at, v, h - at, whole);
    }
  }
}

// Where each thread can hold its share of a row.
constexpr int held = 4;

template <class T, bool plain>
__global__ void __launch_bounds__(most_threads, 2) rms_norm_held(const __grid_constant__ RmsNorm a) {
  constexpr int n = lanes<T>;
  const int h = int(a.rows.width);
  const int64_t row = blockIdx.x;
  int sums = 0;
  int64_t offset[2];
  place(offset, a.rows, row);
  const T* x = static_cast<const T*>(a.x) + offset[0];
  uint4 v[held];
#pragma unroll
  for (int k = 0; k < held; ++k) v[k] = vector_at(x, place_of<T>(k), h);
  if (a.residual != nullptr) {
    const T* residual = static_cast<const T*>(a.residual) + offset[1];
    uint4 r[held];
#pragma unroll
    for (int k = 0; k < held; ++k) r[k] = vector_at(residual, place_of<T>(k), h);
    T* total = static_cast<T*>(a.total) + row * h;
#pragma unroll
    for (int k = 0; k < held; ++k) {
      float one[n], other[n];
      widen_vector<T>(one, v[k]);
      widen_vector<T>(other, r[k]);
#pragma unroll
      for (int j = 0; j < n; ++j) one[j] += other[j];
      v[k] = narrow_vector<T>(one);
      if (place_of<T>(k) < h) write(reinterpret_cast<uint4*>(total + place_of<T>(k)), v[k]);
    }
  }
  float squares_of[held];
#pragma unroll
  for (int k = 0; k < held; ++k) {
    float one[n];
    widen_vector<T>(one, v[k]);
    squares_of[k] = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) squares_of[k] = fused(one[j], one[j], squares_of[k]);
  }
  float squares[1] = {sum_of(squares_of)};
  uint4 factor[held];
#pragma unroll
  for (int k = 0; k < held; ++k) factor[k] = ask_factor<T>(a.factor, place_of<T>(k), h, 1);
  block_sum(squares, sums);
  const float rstd = root_of_row<T>(squares[0] / float(h) + float(a.eps));
  if (threadIdx.x == 0) static_cast<float*>(a.rstd)[row] = rstd;
  T* y = static_cast<T*>(a.y) + row * h;
#pragma unroll
  for (int k = 0; k < held; ++k) {
    float one[n];
    widen_vector<T>(one, v[k]);
#pragma unroll
    for (int j = 0; j < n; ++j) one[j] *= rstd;
    if (a.round_first) widen_vector<T>(one, narrow_vector<T>(one));
    float f[n];
    factor_at<T, plain>(f, a.factor, factor[k], place_of<T>(k), h);
#pragma unroll
    for (int j = 0; j < n; ++j) one[j] *= f[j];
    put_vector(y, one, place_of<T>(k), h);
  }
}

template <class T>
__global__ void __launch_bounds__(held_threads(1), 1) rms_norm_bwd_held(const __grid_constant__ RmsNormBwd a, int depth) {
  constexpr int n = lanes<T>, held = held_back(1);
  const int h = int(a.rows.width);
  const Stages<held> rows{a.added != nullptr ? 3 : 2, depth};
  Walk<3> next(a.rows, a.block_rows);
  const auto fetch = [&](int slot) {
    if (next.at < next.many) {
      uint4* const to = rows.row(slot);
      rows.fetch<T>(to, 0, a.gradient, next.offset[0], h);
      rows.fetch<T>(to, 1, a.x, next.offset[2], h);
      if (a.added != nullptr) rows.fetch<T>(to, 2, a.added, next.offset[1], h);
      next.step();
    }
    end_group();
  };
  RowNumbers rstds(a.rstd, next.first, next.many);
  for (int ahead = 0; ahead + 1 < depth; ++ahead) fetch(ahead);
  float f[held][n], of_factor[held][n] = {};
#pragma unroll
  for (int k = 0; k < held; ++k) factor_at<T, false>(f[k], a.factor, place_of<T>(k), h, 1);
  const float share = 1 / float(h);
  int slot = 0, free = depth - 1, sums = 0;
  for (int at = 0; at < next.many; ++at) {
    fetch(free);
    free = rows.after(free);
    const float rstd = rstds.of(at);
    rows.await();
    const uint4* const held_row = rows.row(slot);
    slot = rows.after(slot);
    float along_of[held] = {};
#pragma unroll
    for (int k = 0; k < held; ++k) {
      float g[n], v[n];
      staged_vector<T, held>(g, held_row, 0, k);
      staged_vector<T, held>(v, held_row, 1, k);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const float normal = v[j] * rstd;
        of_factor[k][j] = fused(g[j], normal, of_factor[k][j]);
        along_of[k] = fused(g[j] * f[k][j], normal, along_of[k]);
      }
    }
    float along[1] = {sum_of(along_of)};
    block_sum(along, sums);
    const float back = along[0] * share * rstd;
    T* of_x = static_cast<T*>(a.of_x) + (next.first + at) * h;
#pragma unroll
    for (int k = 0; k < held; ++k) {
      float g[n], v[n];
      staged_vector<T, held>(g, held_row, 0, k);
      staged_vector<T, held>(v, held_row, 1, k);
#pragma unroll
      for (int j = 0; j < n; ++j) v[j] = fused(v[j], -back, g[j] * f[k][j]) * rstd;
      if (a.added != nullptr) {
        staged_vector<T, held>(g, held_row, 2, k);
#pragma unroll
        for (int j = 0; j < n; ++j) v[j] += g[j];
      }
      put_vector(of_x, v, place_of<T>(k), h);
    }
  }
  if (a.partial == nullptr) return;
  float* partial = static_cast<float*>(a.partial) + int64_t(blockIdx.x) * h;
#pragma unroll
  for (int k = 0; k < held; ++k) put_sums<T>(partial, of_factor[k], place_of<T>(k), h);
}

template <class T>
__global__ void __launch_bounds__(most_threads, 1) rms_norm_bwd(const __grid_constant__ RmsNormBwd a, bool whole, bool staged) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>;
  const int64_t h = a.rows.width, step = int64_t(blockDim.x) * n;
  BlockSums<T, 1> sums({static_cast<W*>(a.partial)}, h, staged);
  T* const kept_gradient = staged ? reinterpret_cast<T*>(sums.behind()) + threadIdx.y * 2 * padded<T>(h) : nullptr;
  T* const kept_x = staged ? kept_gradient + padded<T>(h) : nullptr;
  const int64_t first = blockIdx.x * a.block_rows, last = first + a.block_rows < a.rows.count ? first + a.block_rows : a.rows.count;
  for (int64_t row = first + threadIdx.y; row < last; row += blockDim.y) {
    int64_t offset[3];
    place(offset, a.rows, row);
    const T* gradient = static_cast<const T*>(a.gradient) + offset[0];
    const T* x = static_cast<const T*>(a.x) + offset[2];
    const W rstd = static_cast<const W*>(a.rstd)[row];
    W along[1] = {};
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W g[n], v[n];
      load(g, gradient + at, h - at, whole);
      load(v, x + at, h - at, whole);
      if (staged) {
        keep(kept_gradient + at, g);
        keep(kept_x + at, v);
      }
      W f[n];
      if (a.factor.held != nullptr) load_factor<T>(f, a.factor, at, h - at, whole);
      W products[n];
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const W normal = v[j] * rstd;
        products[j] = g[j] * normal;
        along[0] += (a.factor.held == nullptr ? g[j] : g[j] * f[j]) * normal;
      }
      sums.add(0, products, at, h - at, whole);
    }
    row_sum(along);
    const W mean = along[0] / W(h);
    T* of_x = static_cast<T*>(a.of_x) + row * h;
    const T* again_gradient = staged ? kept_gradient : gradient;
    const T* again_x = staged ? kept_x : x;
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W g[n], v[n];
      load(g, again_gradient + at, staged ? n : h - at, whole || staged);
      load(v, again_x + at, staged ? n : h - at, whole || staged);
      if (a.factor.held != nullptr) {
        W f[n];
        load_factor<T>(f, a.factor, at, h - at, whole);
#pragma unroll
        for (int j = 0; j < n; ++j) g[j] *= f[j];
      }
#pragma unroll
      for (int j = 0; j < n; ++j) v[j] = (g[j] - v[j] * rstd * mean) * rstd;
      if (a.added != nullptr) {
        W more[n];
        load(more, static_cast<const T*>(a.added) + offset[1] + at, h - at, whole);
#pragma unroll
        for (int j = 0; j < n; ++j) v[j] += more[j];
      }
      store(of_x + at, v, h - at, whole);
    }
  }
  sums.finish();
}

}  // namespace

void run(const RmsNorm& a, const Device& device) {
  of_dtype(a.dtype, [&](auto of) {
    typedef decltype(of) T;
    const bool whole =
        aligned(a.rows, sizeof(T), {a.x, a.residual, a.factor.held, a.y, a.total}, 2) && a.rows.width % lanes<T> == 0;
    if constexpr (sizeof(T) <= most_held_bytes) {
      const int64_t vectors = a.rows.width / lanes<T>;
      if (whole && holds(vectors, held) && a.rows.count <= most_blocks) {
        const Shape shape{a.rows.count, holding_threads(vectors, held), 1, exchange_bytes};
        return start(device, is_plain(a.factor) ? rms_norm_held<T, true> : rms_norm_held<T, false>, shape, a);
      }
    }
    Shape shape = Shape::of_rows(quotient_up(a.rows.width, lanes<T>));
    const bool staged = stages(shape, padded<T>(a.rows.width) * sizeof(T), device.shared);
    shape.blocks = std::min(quotient_up(a.rows.count, shape.rows), most_blocks);
    start(device, rms_norm<T>, shape, a, whole, staged);
  });
}

void run(const RmsNormBwd& a, const Device& device) {
  of_dtype(a.dtype, [&](auto of) {
    typedef decltype(of) T;
    const int64_t blocks = quotient_up(a.rows.count, a.block_rows);
    const bool whole = aligned(a.rows, sizeof(T), {a.gradient, a.added, a.x, a.factor.held, a.of_x, a.partial}, 3) &&
                       a.rows.width % lanes<T> == 0;
    if constexpr (sizeof(T) <= most_held_bytes) {
      const int64_t vectors = a.rows.width / lanes<T>;
      if (whole && holds(vectors, held_back(1))) {
        const Holding found = holding(vectors, held_back(1), blocks, a.added != nullptr ? 3 : 2, device);
        if (found.depth > 0) return start(device, rms_norm_bwd_held<T>, found.shape, a, found.depth);
      }
    }
    Shape shape = backward_shape(a.rows.width, lanes<T>);
    const int64_t each = 2 * padded<T>(a.rows.width) * sizeof(T) + BlockSums<T, 1>::bytes(a.rows.width);
    const bool staged = stages(shape, each, device.shared);
    shape.blocks = blocks;
    start(device, rms_norm_bwd<T>, shape, a, whole, staged);
  });
}

}  // namespace shardcomp::cuda
