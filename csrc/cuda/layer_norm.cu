// Layer norm and its backward. How a row is read once is told in rms_norm.cu.

#include "norm.h"

namespace shardcomp::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(most_threads, 1) layer_norm(const __grid_constant__ LayerNorm a, bool whole, bool staged) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>;
  const int64_t h = a.rows.width, step = int64_t(blockDim.x) * n;
  for (int64_t row = first_row(); row < a.rows.count; row += row_step()) {
    int64_t offset[1];
    place(offset, a.rows, row);
    const T* x = static_cast<const T*>(a.x) + offset[0];
    T* kept = staged ? reinterpret_cast<T*>(stage()) + threadIdx.y * padded<T>(h) : nullptr;
    W total[1] = {};
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W v[n];
      load(v, x + at, h - at, whole);
      if (staged) keep(kept + at, v);
#pragma unroll
      for (int j = 0; j < n; ++j) total[0] += v[j];
    }
    row_sum(total);
    const W mean = total[0] / W(h);
    const T* again = staged ? kept : x;
    W squares[1] = {};
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W v[n];
      load(v, again + at, h - at, whole || staged);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const W apart = at + j < h ? v[j] - mean : W(0);
        squares[0] += apart * apart;
      }
    }
    row_sum(squares);
    const W rstd = reciprocal_root(squares[0] / W(h) + W(a.eps));
    if (threadIdx.x == 0) {
      static_cast<W*>(a.mean)[row] = mean;
      static_cast<W*>(a.rstd)[row] = rstd;
    }
    T* y = static_cast<T*>(a.y) + row * h;
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W v[n], f[n];
      load(v, again + at, h - at, whole || staged);
#pragma unroll
      for (int j = 0; j < n; ++j) v[j] = (v[j] - mean) * rstd;
      if (a.weight.held != nullptr) {
        load_factor<T>(f, a.weight, at, h - at, whole);
#pragma unroll
        for (int j = 0; j < n; ++j) v[j] *= f[j];
      }
      if (a.bias.held != nullptr) {
        load_factor<T>(f, a.bias, at, h - at, whole);
#pragma unroll
        for (int j = 0; j < n; ++j) v[j] += f[j];
      }
      store(y + at, v, h - at, whole);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(most_threads, 1) layer_norm_bwd(const __grid_constant__ LayerNormBwd a, bool whole, bool staged) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>;
  const int64_t h = a.rows.width, step = int64_t(blockDim.x) * n;
  BlockSums<T, 2> sums({static_cast<W*>(a.partial_weight), static_cast<W*>(a.partial_bias)}, h, staged);
  T* const kept_gradient = staged ? reinterpret_cast<T*>(sums.behind()) + threadIdx.y * 2 * padded<T>(h) : nullptr;
  T* const kept_x = staged ? kept_gradient + padded<T>(h) : nullptr;
  const int64_t first = blockIdx.x * a.block_rows, last = first + a.block_rows < a.rows.count ? first + a.block_rows : a.rows.count;
  for (int64_t row = first + threadIdx.y; row < last; row += blockDim.y) {
    int64_t offset[2];
    place(offset, a.rows, row);
    const T* gradient = static_cast<const T*>(a.gradient) + offset[0];
    const T* x = static_cast<const T*>(a.x) + offset[1];
    const W mean = static_cast<const W*>(a.mean)[row], rstd = static_cast<const W*>(a.rstd)[row];
    W means[2] = {};  // of the scaled gradient, and of it along the normalised values
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W g[n], v[n];
      load(g, gradient + at, h - at, whole);
      load(v, x + at, h - at, whole);
      if (staged) {
        keep(kept_gradient + at, g);
        keep(kept_x + at, v);
      }
      sums.add(1, g, at, h - at, whole);
      W f[n];
      if (a.weight.held != nullptr) load_factor<T>(f, a.weight, at, h - at, whole);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const W normal = (v[j] - mean) * rstd, scaled = a.weight.held == nullptr ? g[j] : g[j] * f[j];
        v[j] = g[j] * normal;
        means[0] += scaled;
        means[1] += at + j < h ? scaled * normal : W(0);
      }
      sums.add(0, v, at, h - at, whole);
    }
    row_sum(means);
    const W plain = means[0] / W(h), along = means[1] / W(h);
    T* of_x = static_cast<T*>(a.of_x) + row * h;
    const T* again_gradient = staged ? kept_gradient : gradient;
    const T* again_x = staged ? kept_x : x;
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W g[n], v[n];
      load(g, again_gradient + at, h - at, whole || staged);
      load(v, again_x + at, h - at, whole || staged);
      if (a.weight.held != nullptr) {
        W f[n];
        load_factor<T>(f, a.weight, at, h - at, whole);
#pragma unroll
        for (int j = 0; j < n; ++j) g[j] *= f[j];
      }
#pragma unroll
      for (int j = 0; j < n; ++j) v[j] = (g[j] - plain - (v[j] - mean) * rstd * along) * rstd;
      store(of_x + at, v, h - at, whole);
    }
  }
  sums.finish();
}

}  // namespace

void run(const LayerNorm& a, const Device& device) {
  of_dtype(a.dtype, [&](auto held) {
    typedef decltype(held) T;
    Shape shape = Shape::of_rows(quotient_up(a.rows.width, lanes<T>));
    const bool staged = stages(shape, padded<T>(a.rows.width) * sizeof(T), device.shared);
    shape.blocks = std::min(quotient_up(a.rows.count, shape.rows), most_blocks);
    const bool whole = aligned(a.rows, sizeof(T), {a.x, a.weight.held, a.bias.held, a.y}, 1) && a.rows.width % lanes<T> == 0;
    start(device, layer_norm<T>, shape, a, whole, staged);
  });
}

void run(const LayerNormBwd& a, const Device& device) {
  of_dtype(a.dtype, [&](auto held) {
    typedef decltype(held) T;
    Shape shape = backward_shape(a.rows.width, lanes<T>);
    const int64_t each = 2 * padded<T>(a.rows.width) * sizeof(T) + BlockSums<T, 2>::bytes(a.rows.width);
    const bool staged = stages(shape, each, device.shared);
    shape.blocks = quotient_up(a.rows.count, a.block_rows);
    const bool whole = aligned(a.rows, sizeof(T), {a.gradient, a.x, a.weight.held, a.of_x, a.partial_weight, a.partial_bias}, 2) &&
                       a.rows.width % lanes<T> == 0;
    start(device, layer_norm_bwd<T>, shape, a, whole, staged);
  });
}

}  // namespace shardcomp::cuda
