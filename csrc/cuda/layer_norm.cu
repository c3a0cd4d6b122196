// Layer norm (Ba, Kiros and Hinton, https://arxiv.org/abs/1607.06450) and its backward. x is [rows, h] in T; all arithmetic is
// in W, float32 or float64. rms_norm.cu explains how a row is read from memory once.
//
//   forward:   rstd = 1 / √(mean((x - mean)²) + eps);  y = (x - mean) · rstd · weight + bias
//   backward:  with n = (x - mean) · rstd and g = gradient · weight:
//              of_x = (g - mean(g) - n · mean(g · n)) · rstd;  of_weight = Σ gradient · n;  of_bias = Σ gradient, over rows
//
// Memory traffic for an element of T: 2 accesses forward, 3 backward. Saved for the backward: mean and rstd of each row.
//
// The variance takes a second pass over the row, which is on chip by then and costs no memory traffic. mean(x²) - mean(x)² in
// one pass cancels where the mean is large beside the deviation, and Welford's update needs a division for each element.

#include "norm.h"

namespace shardcomp::cuda {
namespace {

// Applies weight and bias. Where there is none, a weight of 1 and a bias of -0 change no bit; a bias of +0 would turn -0 into
// +0.
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
__global__ void __launch_bounds__(most_threads, 1) layer_norm(const __grid_constant__ LayerNorm a, bool vectorized, bool staged) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>;
  const int64_t h = a.rows.width, step = int64_t(blockDim.x) * n;
  for (int64_t row = first_row(); row < a.rows.count; row += row_step()) {
    int64_t offset[1];
    row_offsets(offset, a.rows, row);
    const T* x = static_cast<const T*>(a.x) + offset[0];
    T* staged_row = staged ? reinterpret_cast<T*>(stage()) + threadIdx.y * padded<T>(h) : nullptr;
    W total[1] = {};
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W v[n];
      load(v, x + at, h - at, vectorized);
      if (staged) keep(staged_row + at, v);
#pragma unroll
      for (int j = 0; j < n; ++j) total[0] += v[j];
    }
    row_sum(total);
    const W mean = total[0] / W(h);
    const T* again = staged ? staged_row : x;
    W squares[1] = {};
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W v[n];
      load(v, again + at, h - at, vectorized || staged);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        // Past the end of the row a zero would deviate by the mean.
        const W deviation = at + j < h ? v[j] - mean : W(0);
        squares[0] += deviation * deviation;
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
      load(v, again + at, h - at, vectorized || staged);
#pragma unroll
      for (int j = 0; j < n; ++j) v[j] = (v[j] - mean) * rstd;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        f[j] = no_weight;
        b[j] = no_bias;
      }
      if (a.weight.values != nullptr) load_factor<T>(f, a.weight, at, h - at, vectorized);
      if (a.bias.values != nullptr) load_factor<T>(b, a.bias, at, h - at, vectorized);
      scale(v, f, b, a.stepwise);
      store(y + at, v, h - at, vectorized);
    }
  }
}

// The vectors of a row that one thread has in registers at most: 16384 columns of 16 bits for 512 threads.
constexpr int thread_vectors = 4;

template <class T, bool plain>
__global__ void __launch_bounds__(most_threads, 2) layer_norm_held(const __grid_constant__ LayerNorm a) {
  constexpr int n = lanes<T>;
  const int h = int(a.rows.width);
  const int64_t row = blockIdx.x;
  int sums = 0;
  int64_t offset[1];
  row_offsets(offset, a.rows, row);
  const T* x = static_cast<const T*>(a.x) + offset[0];
  uint4 v[thread_vectors];
#pragma unroll
  for (int k = 0; k < thread_vectors; ++k) v[k] = load_vector(x, vector_column<T>(k), h);
  float total_of[thread_vectors], squares_of[thread_vectors];
#pragma unroll
  for (int k = 0; k < thread_vectors; ++k) {
    float one[n];
    widen_vector<T>(one, v[k]);
    total_of[k] = sum_of(one);
  }
  float total[1] = {sum_of(total_of)};
  block_sum(total, sums);
  const float mean = total[0] / float(h);
#pragma unroll
  for (int k = 0; k < thread_vectors; ++k) {
    float one[n];
    widen_vector<T>(one, v[k]);
    squares_of[k] = 0;
    if (vector_column<T>(k) >= h) continue;
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
  for (int k = 0; k < thread_vectors; ++k) {
    float one[n], f[n], b[n];
    // Loaded after the sums, not prefetched: both factors would need 32 registers during them.
    factor_at<T, plain>(f, a.weight, vector_column<T>(k), h, no_weight);
    factor_at<T, plain>(b, a.bias, vector_column<T>(k), h, no_bias);
    widen_vector<T>(one, v[k]);
#pragma unroll
    for (int j = 0; j < n; ++j) one[j] = (one[j] - mean) * rstd;
    scale(one, f, b, a.stepwise);
    store_vector(y, one, vector_column<T>(k), h);
  }
}

// As in rms_norm.cu, with two sums for each column: half as many vectors for a thread, and more threads.
template <class T>
__global__ void __launch_bounds__(backward_threads(2), 1) layer_norm_bwd_held(const __grid_constant__ LayerNormBwd a, int depth) {
  constexpr int n = lanes<T>, thread_vectors = backward_vectors(2);
  const int h = int(a.rows.width);
  const Stages<thread_vectors> rows{2, depth};
  Walk<2> next(a.rows, a.block_rows);
  const auto fetch = [&](int slot) {
    if (next.at < next.row_count) {
      uint4* const to = rows.row(slot);
      rows.fetch<T>(to, 0, a.gradient, next.offset[0], h);
      rows.fetch<T>(to, 1, a.x, next.offset[1], h);
      next.step();
    }
    end_group();  // an empty group too, so that `await` can count groups
  };
  RowNumbers means(a.mean, next.first, next.row_count), rstds(a.rstd, next.first, next.row_count);
  for (int ahead = 0; ahead + 1 < depth; ++ahead) fetch(ahead);
  float f[thread_vectors][n], of_weight[thread_vectors][n] = {}, of_bias[thread_vectors][n] = {};
#pragma unroll
  for (int k = 0; k < thread_vectors; ++k) factor_at<T, false>(f[k], a.weight, vector_column<T>(k), h, no_weight);
  const float share = 1 / float(h);
  int slot = 0, free = depth - 1, sums = 0;
  for (int at = 0; at < next.row_count; ++at) {
    fetch(free);
    free = rows.after(free);
    const float mean = means.of(at), rstd = rstds.of(at);
    rows.await();
    const uint4* const ring_row = rows.row(slot);
    slot = rows.after(slot);
    float plain_of[thread_vectors] = {}, along_of[thread_vectors] = {};
#pragma unroll
    for (int k = 0; k < thread_vectors; ++k) {
      float g[n], v[n];
      staged_vector<T, thread_vectors>(g, ring_row, 0, k);
      staged_vector<T, thread_vectors>(v, ring_row, 1, k);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const float normal = (v[j] - mean) * rstd, scaled = g[j] * f[k][j];
        of_weight[k][j] = fused(g[j], normal, of_weight[k][j]);
        of_bias[k][j] += g[j];
        plain_of[k] += scaled;
        along_of[k] = fused(scaled, normal, along_of[k]);
      }
    }
    float two[2] = {sum_of(plain_of), sum_of(along_of)};  // Σ g and Σ g · n, in one exchange between warps
    block_sum(two, sums);
    const float plain = two[0] * share, along = two[1] * share * rstd * rstd;
    T* of_x = static_cast<T*>(a.of_x) + (next.first + at) * h;
#pragma unroll
    for (int k = 0; k < thread_vectors; ++k) {
      float g[n], v[n];
      staged_vector<T, thread_vectors>(g, ring_row, 0, k);
      staged_vector<T, thread_vectors>(v, ring_row, 1, k);
#pragma unroll
      for (int j = 0; j < n; ++j) v[j] = fused(v[j] - mean, -along, fused(g[j], f[k][j], -plain) * rstd);
      store_vector(of_x, v, vector_column<T>(k), h);
    }
  }
#pragma unroll
  for (int k = 0; k < thread_vectors; ++k) {
    if (a.partial_weight != nullptr) {
      store_sums<T>(static_cast<float*>(a.partial_weight) + int64_t(blockIdx.x) * h, of_weight[k], vector_column<T>(k), h);
    }
    if (a.partial_bias != nullptr) {
      store_sums<T>(static_cast<float*>(a.partial_bias) + int64_t(blockIdx.x) * h, of_bias[k], vector_column<T>(k), h);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(most_threads, 1)
    layer_norm_bwd(const __grid_constant__ LayerNormBwd a, bool vectorized, bool staged) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>;
  const int64_t h = a.rows.width, step = int64_t(blockDim.x) * n;
  BlockSums<T, 2> sums({static_cast<W*>(a.partial_weight), static_cast<W*>(a.partial_bias)}, h, staged);
  T* const staged_gradient = staged ? reinterpret_cast<T*>(sums.end()) + threadIdx.y * 2 * padded<T>(h) : nullptr;
  T* const staged_x = staged ? staged_gradient + padded<T>(h) : nullptr;
  const int64_t first = blockIdx.x * a.block_rows;
  const int64_t last = first + a.block_rows < a.rows.count ? first + a.block_rows : a.rows.count;
  for (int64_t row = first + threadIdx.y; row < last; row += blockDim.y) {
    int64_t offset[2];
    row_offsets(offset, a.rows, row);
    const T* gradient = static_cast<const T*>(a.gradient) + offset[0];
    const T* x = static_cast<const T*>(a.x) + offset[1];
    const W mean = static_cast<const W*>(a.mean)[row], rstd = static_cast<const W*>(a.rstd)[row];
    W means[2] = {};  // of g and of g · n
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W g[n], v[n];
      load(g, gradient + at, h - at, vectorized);
      load(v, x + at, h - at, vectorized);
      if (staged) {
        keep(staged_gradient + at, g);
        keep(staged_x + at, v);
      }
      sums.add(1, g, at, h - at, vectorized);
      W f[n];
      if (a.weight.values != nullptr) load_factor<T>(f, a.weight, at, h - at, vectorized);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const W normal = (v[j] - mean) * rstd, scaled = a.weight.values == nullptr ? g[j] : g[j] * f[j];
        v[j] = g[j] * normal;
        means[0] += scaled;
        means[1] += at + j < h ? scaled * normal : W(0);
      }
      sums.add(0, v, at, h - at, vectorized);
    }
    row_sum(means);
    const W plain = means[0] / W(h), along = means[1] / W(h);
    T* of_x = static_cast<T*>(a.of_x) + row * h;
    const T* again_gradient = staged ? staged_gradient : gradient;
    const T* again_x = staged ? staged_x : x;
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W g[n], v[n];
      load(g, again_gradient + at, h - at, vectorized || staged);
      load(v, again_x + at, h - at, vectorized || staged);
      if (a.weight.values != nullptr) {
        W f[n];
        load_factor<T>(f, a.weight, at, h - at, vectorized);
#pragma unroll
        for (int j = 0; j < n; ++j) g[j] *= f[j];
      }
#pragma unroll
      for (int j = 0; j < n; ++j) v[j] = (g[j] - plain - (v[j] - mean) * rstd * along) * rstd;
      store(of_x + at, v, h - at, vectorized);
    }
  }
  sums.finish();
}

}  // namespace

void run(const LayerNorm& a, const Device& device) {
  of_dtype(a.dtype, [&](auto element) {
    typedef decltype(element) T;
    const bool vectorized =
        aligned(a.rows, sizeof(T), {a.x, a.weight.values, a.bias.values, a.y}, 1) && a.rows.width % lanes<T> == 0;
    if constexpr (sizeof(T) <= most_register_bytes) {
      const int64_t vectors = a.rows.width / lanes<T>;
      if (vectorized && fits_registers(vectors, thread_vectors) && a.rows.count <= most_blocks) {
        const Shape shape{a.rows.count, register_threads(vectors, thread_vectors), 1, exchange_bytes};
        const bool plain = is_plain(a.weight) && is_plain(a.bias);
        return start(device, plain ? layer_norm_held<T, true> : layer_norm_held<T, false>, shape, a);
      }
    }
    Shape shape = Shape::of_rows(quotient_up(a.rows.width, lanes<T>));
    const bool staged = stages(shape, padded<T>(a.rows.width) * sizeof(T), device.shared);
    shape.blocks = std::min(quotient_up(a.rows.count, shape.rows), most_blocks);
    start(device, layer_norm<T>, shape, a, vectorized, staged);
  });
}

void run(const LayerNormBwd& a, const Device& device) {
  of_dtype(a.dtype, [&](auto element) {
    typedef decltype(element) T;
    const int64_t blocks = quotient_up(a.rows.count, a.block_rows);
    const bool vectorized =
        aligned(a.rows, sizeof(T), {a.gradient, a.x, a.weight.values, a.of_x, a.partial_weight, a.partial_bias}, 2) &&
        a.rows.width % lanes<T> == 0;
    if constexpr (sizeof(T) <= most_register_bytes) {
      const int64_t vectors = a.rows.width / lanes<T>;
      if (vectorized && fits_registers(vectors, backward_vectors(2))) {
        const RegisterPlan plan = register_plan(vectors, backward_vectors(2), blocks, 2, device);
        if (plan.depth > 0) return start(device, layer_norm_bwd_held<T>, plan.shape, a, plan.depth);
      }
    }
    Shape shape = backward_shape(a.rows.width, lanes<T>);
    const int64_t row_bytes = 2 * padded<T>(a.rows.width) * sizeof(T) + BlockSums<T, 2>::bytes(a.rows.width);
    const bool staged = stages(shape, row_bytes, device.shared);
    shape.blocks = blocks;
    start(device, layer_norm_bwd<T>, shape, a, vectorized, staged);
  });
}

}  // namespace shardcomp::cuda
