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
    const W rstd = reciprocal_root(squares[0] / W(h) + W(a.eps));
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
  of_dtype(a.dtype, [&](auto held) {
    typedef decltype(held) T;
    Shape shape = Shape::of_rows(quotient_up(a.rows.width, lanes<T>));
    const bool staged = stages(shape, padded<T>(a.rows.width) * sizeof(T), device.shared);
    shape.blocks = std::min(quotient_up(a.rows.count, shape.rows), most_blocks);
    const bool whole = aligned(a.rows, sizeof(T), {a.x, a.residual, a.factor.held, a.y, a.total}, 2) && a.rows.width % lanes<T> == 0;
    start(device, rms_norm<T>, shape, a, whole, staged);
  });
}

void run(const RmsNormBwd& a, const Device& device) {
  of_dtype(a.dtype, [&](auto held) {
    typedef decltype(held) T;
    Shape shape = backward_shape(a.rows.width, lanes<T>);
    const int64_t each = 2 * padded<T>(a.rows.width) * sizeof(T) + BlockSums<T, 1>::bytes(a.rows.width);
    const bool staged = stages(shape, each, device.shared);
    shape.blocks = quotient_up(a.rows.count, a.block_rows);
    const bool whole = aligned(a.rows, sizeof(T), {a.gradient, a.added, a.x, a.factor.held, a.of_x, a.partial}, 3) &&
                       a.rows.width % lanes<T> == 0;
    start(device, rms_norm_bwd<T>, shape, a, whole, staged);
  });
}

}  // namespace shardcomp::cuda
