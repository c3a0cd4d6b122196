// Layer norm and its backward. How a row is read once is told in rms_norm.cu.

#include "norm.h"

namespace shardcomp::cuda {
namespace {

// What is normalised becomes a result. A weight of 1 and a bias of -0 change no bit.
constexpr float no_weight = 1, no_bias = -0.0f;

template <int n, class W>
DEVICE void scale(W (&x)[n], const W (&weight)[n], const W (&bias)[n], bool stepwise) {
  if (stepwise) {
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] = x[j] * weight[j] + bias[j];
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] = fused(x[j], weight[j], bias[j]);
  }
}

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
    const W rstd = root_of_row<T>(squares[0] / W(h) + W(a.eps));
    if (threadIdx.x == 0) {
      static_cast<W*>(a.mean)[row] = mean;
      static_cast<W*>(a.rstd)[row] = rstd;
    }
    T* y = static_cast<T*>(a.y) + row * h;
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W v[n], f[n], b[n];
      load(v, again + at, h - at, whole || staged);
#pragma unroll
      for (int j = 0; j < n; ++j) v[j] = (v[j] - mean) * rstd;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        f[j] = no_weight;
        b[j] = no_bias;
      }
      if (a.weight.held != nullptr) load_factor<T>(f, a.weight, at, h - at, whole);
      if (a.bias.held != nullptr) load_factor<T>(b, a.bias, at, h - at, whole);
      scale(v, f, b, a.stepwise);
      store(y + at, v, h - at, whole);
    }
  }
}

// Where each thread can hold its share of a row.
constexpr int held = 4;

template <class T, bool plain>
__global__ void __launch_bounds__(most_threads, 2) layer_norm_held(const __grid_constant__ LayerNorm a) {
  constexpr int n = lanes<T>;
  const int h = int(a.rows.width);
  const int64_t row = blockIdx.x;
  int sums = 0;
  int64_t offset[1];
  place(offset, a.rows, row);
  const T* x = static_cast<const T*>(a.x) + offset[0];
  uint4 v[held];
#pragma unroll
  for (int k = 0; k < held; ++k) v[k] = vector_at(x, place_of<T>(k), h);
  float total_of[held], squares_of[held];
#pragma unroll
  for (int k = 0; k < held; ++k) {
    float one[n];
    widen_vector<T>(one, v[k]);
    total_of[k] = sum_of(one);
  }
  float total[1] = {sum_of(total_of)};
  block_sum(total, sums);
  const float mean = total[0] / float(h);
#pragma unroll
  for (int k = 0; k < held; ++k) {
    float one[n];
    widen_vector<T>(one, v[k]);
    squares_of[k] = 0;
    if (place_of<T>(k) >= h) continue;
#pragma unroll
    for (int j = 0; j < n; ++j) squares_of[k] = fused(one[j] - mean, one[j] - mean, squares_of[k]);
  }
  float squares[1] = {sum_of(squares_of)};
  block_sum(squares, sums);
  const float rstd = root_of_row<T>(squares[0] / float(h) + float(a.eps));
  if (threadIdx.x == 0) {
    static_cast<float*>(a.mean)[row] = mean;
    static_cast<float*>(a.rstd)[row] = rstd;
  }
  T* y = static_cast<T*>(a.y) + row * h;
#pragma unroll
  for (int k = 0; k < held; ++k) {
    float one[n], f[n], b[n];
    factor_at<T, plain>(f, a.weight, place_of<T>(k), h, no_weight);  // which has no register before the sums are made
    factor_at<T, plain>(b, a.bias, place_of<T>(k), h, no_bias);
    widen_vector<T>(one, v[k]);
#pragma unroll
    for (int j = 0; j < n; ++j) one[j] = (one[j] - mean) * rstd;
    scale(one, f, b, a.stepwise);
    put_vector(y, one, place_of<T>(k), h);
  }
}

template <class T>
__global__ void __launch_bounds__(held_threads(2), 1) layer_norm_bwd_held(const __grid_constant__ LayerNormBwd a, int depth) {
  constexpr int n = lanes<T>, held = held_back(2);
  const int h = int(a.rows.width);
  const Stages<held> rows{2, depth};
  Walk<2> next(a.rows, a.block_rows);
  const auto fetch = [&](int slot) {
    if (next.at < next.many) {
      uint4* const to = rows.row(slot);
      rows.fetch<T>(to, 0, a.gradient, next.offset[0], h);
      rows.fetch<T>(to, 1, a.x, next.offset[1], h);
      next.step();
    }
    end_group();
  };
  RowNumbers means(a.mean, next.first, next.many), rstds(a.rstd, next.first, next.many);
  for (int ahead = 0; ahead + 1 < depth; ++ahead) fetch(ahead);
  float f[held][n], of_weight[held][n] = {}, of_bias[held][n] = {};
#pragma unroll
  for (int k = 0; k < held; ++k) factor_at<T, false>(f[k], a.weight, place_of<T>(k), h, no_weight);
  const float share = 1 / float(h);
  int slot = 0, free = depth - 1, sums = 0;
  for (int at = 0; at < next.many; ++at) {
    fetch(free);
    free = rows.after(free);
    const float mean = means.of(at), rstd = rstds.of(at);
    rows.await();
    const uint4* const held_row = rows.row(slot);
    slot = rows.after(slot);
    float plain_of[held] = {}, along_of[held] = {};
#pragma unroll
    for (int k = 0; k < held; ++k) {
      float g[n], v[n];
      staged_vector<T, held>(g, held_row, 0, k);
      staged_vector<T, held>(v, held_row, 1, k);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const float normal = (v[j] - mean) * rstd, scaled = g[j] * f[k][j];
        of_weight[k][j] = fused(g[j], normal, of_weight[k][j]);
        of_bias[k][j] += g[j];
        plain_of[k] += scaled;
        along_of[k] = fused(scaled, normal, along_of[k]);
      }
    }
    float two[2] = {sum_of(plain_of), sum_of(along_of)};  // of the scaled gradient, and of it along the normalised values
    block_sum(two, sums);
    const float plain = two[0] * share, along = two[1] * share * rstd * rstd;
    T* of_x = static_cast<T*>(a.of_x) + (next.first + at) * h;
#pragma unroll
    for (int k = 0; k < held; ++k) {
      float g[n], v[n];
      staged_vector<T, held>(g, held_row, 0, k);
      staged_vector<T, held>(v, held_row, 1, k);
#pragma unroll
      for (int j = 0; j < n; ++j) v[j] = fused(v[j] - mean, -along, fused(g[j], f[k][j], -plain) * rstd);
      put_vector(of_x, v, place_of<T>(k), h);
    }
  }
#pragma unroll
  for (int k = 0; k < held; ++k) {
    if (a.partial_weight != nullptr) {
      put_sums<T>(static_cast<float*>(a.partial_weight) + int64_t(blockIdx.x) * h, of_weight[k], place_of<T>(k), h);
    }
    if (a.partial_bias != nullptr) {
      put_sums<T>(static_cast<float*>(a.partial_bias) + int64_t(blockIdx.x) * h, of_bias[k], place_of<T>(k), h);
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
  of_dtype(a.dtype, [&](auto of) {
    typedef decltype(of) T;
    const bool whole = aligned(a.rows, sizeof(T), {a.x, a.weight.held, a.bias.held, a.y}, 1) && a.rows.width % lanes<T> == 0;
    if constexpr (sizeof(T) <= most_held_bytes) {
      const int64_t vectors = a.rows.width / lanes<T>;
      if (whole && holds(vectors, held) && a.rows.count <= most_blocks) {
        const Shape shape{a.rows.count, holding_threads(vectors, held), 1, exchange_bytes};
        const bool plain = is_plain(a.weight) && is_plain(a.bias);
        return start(device, plain ? layer_norm_held<T, true> : layer_norm_held<T, false>, shape, a);
      }
    }
    Shape shape = Shape::of_rows(quotient_up(a.rows.width, lanes<T>));
    const bool staged = stages(shape, padded<T>(a.rows.width) * sizeof(T), device.shared);
    shape.blocks = std::min(quotient_up(a.rows.count, shape.rows), most_blocks);
    start(device, layer_norm<T>, shape, a, whole, staged);
  });
}

void run(const LayerNormBwd& a, const Device& device) {
  of_dtype(a.dtype, [&](auto of) {
    typedef decltype(of) T;
    const int64_t blocks = quotient_up(a.rows.count, a.block_rows);
    const bool whole = aligned(a.rows, sizeof(T), {a.gradient, a.x, a.weight.held, a.of_x, a.partial_weight, a.partial_bias}, 2) &&
                       a.rows.width % lanes<T> == 0;
    if constexpr (sizeof(T) <= most_held_bytes) {
      const int64_t vectors = a.rows.width / lanes<T>;
      if (whole && holds(vectors, held_back(2))) {
        const Holding found = holding(vectors, held_back(2), blocks, 2, device);
        if (found.depth > 0) return start(device, layer_norm_bwd_held<T>, found.shape, a, found.depth);
      }
    }
    Shape shape = backward_shape(a.rows.width, lanes<T>);
    const int64_t each = 2 * padded<T>(a.rows.width) * sizeof(T) + BlockSums<T, 2>::bytes(a.rows.width);
    const bool staged = stages(shape, each, device.shared);
    shape.blocks = blocks;
    start(device, layer_norm_bwd<T>, shape, a, whole, staged);
  });
}

}  // namespace shardcomp::cuda
