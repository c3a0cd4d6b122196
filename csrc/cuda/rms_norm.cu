// RMS norm (Zhang and Sennrich, https://arxiv.org/abs/1910.07467), with or without a residual addition before it, and the
// backward of both. x is [rows, h] in T; all arithmetic is in W, float32 or float64.
//
//   forward:   s = x + residual, rounded to T;  rstd = 1 / √(mean(s²) + eps);  y = s · rstd · (offset + weight)
//   backward:  with n = s · rstd and g = gradient · (offset + weight):
//              of_x = (g - n · mean(g · n)) · rstd + added;  of_weight = Σ over rows of gradient · n
//
// Memory traffic for an element of T: 2 accesses forward (read x, write y), 4 with a residual; 3 backward (read gradient and x,
// write of_x), 4 with `added`. Saved for the backward: rstd, one number per row; n is computed again, which costs one product.
//
// The bits are those of HuggingFace's chain: the squares are summed in W from the rounded sum, and with `round_first` the
// normalised value is rounded to T before the weight. Only the order of the sum over a row differs.

#include "norm.h"

namespace shardcomp::cuda {
namespace {

// Any width, alignment and dtype. The row is needed twice, for the sum and for the result; in between it stays in shared memory
// if it fits (`staged`), else it is read from memory again. Each thread reads back only what it wrote, so that no barrier is
// needed.
template <class T>
__global__ void __launch_bounds__(most_threads, 1) rms_norm(const __grid_constant__ RmsNorm a, bool vectorized, bool staged) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>;
  const int64_t h = a.rows.width, step = int64_t(blockDim.x) * n;
  const T* const residuals = static_cast<const T*>(a.residual);
  for (int64_t row = first_row(); row < a.rows.count; row += row_step()) {
    int64_t offset[2];
    row_offsets(offset, a.rows, row);
    const T* x = static_cast<const T*>(a.x) + offset[0];
    T* total = static_cast<T*>(a.total) + row * h;
    T* staged_row = staged ? reinterpret_cast<T*>(stage()) + threadIdx.y * padded<T>(h) : nullptr;
    W squares[1] = {};
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W v[n];
      load(v, x + at, h - at, vectorized);
      if (residuals != nullptr) {
        W r[n];
        load(r, residuals + offset[1] + at, h - at, vectorized);
#pragma unroll
        for (int j = 0; j < n; ++j) v[j] = rounded<T>(v[j] + r[j]);
        store(total + at, v, h - at, vectorized);
      }
      if (staged) keep(staged_row + at, v);
#pragma unroll
      for (int j = 0; j < n; ++j) squares[0] += v[j] * v[j];
    }
    row_sum(squares);
    const W rstd = root_of_row<T>(squares[0] / W(h) + W(a.eps));
    if (threadIdx.x == 0) static_cast<W*>(a.rstd)[row] = rstd;
    // `total` holds the rounded sum, so reading it back gives the same bits as the staged row.
    const T* again = staged ? staged_row : residuals != nullptr ? total : x;
    T* y = static_cast<T*>(a.y) + row * h;
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W v[n];
      load(v, again + at, staged ? n : h - at, vectorized || staged);
#pragma unroll
      for (int j = 0; j < n; ++j) v[j] *= rstd;
      if (a.factor.values != nullptr) {
        W f[n];
        load_factor<T>(f, a.factor, at, h - at, vectorized);
#pragma unroll
        for (int j = 0; j < n; ++j) v[j] = (a.round_first ? rounded<T>(v[j]) : v[j]) * f[j];
      }
      store(y + at, v, h - at, vectorized);
    }
  }
}

// The row stays in registers, one block for each row: up to 4 vectors for each of 512 threads, which is 16384 columns of 16
// bits. Launch bounds of 2 blocks leave 64 registers for a thread: 16 for the row, 16 for the prefetched weight, 16 for a
// residual.
constexpr int thread_vectors = 4;

template <class T, bool plain>
__global__ void __launch_bounds__(most_threads, 2) rms_norm_held(const __grid_constant__ RmsNorm a) {
  constexpr int n = lanes<T>;
  const int h = int(a.rows.width);
  const int64_t row = blockIdx.x;
  int sums = 0;
  int64_t offset[2];
  row_offsets(offset, a.rows, row);
  const T* x = static_cast<const T*>(a.x) + offset[0];
  // All loads of a row are issued before the first value is used. Columns past the end are zeros, which change no sum.
  uint4 v[thread_vectors];
#pragma unroll
  for (int k = 0; k < thread_vectors; ++k) v[k] = load_vector(x, vector_column<T>(k), h);
  if (a.residual != nullptr) {
    const T* residual = static_cast<const T*>(a.residual) + offset[1];
    uint4 r[thread_vectors];
#pragma unroll
    for (int k = 0; k < thread_vectors; ++k) r[k] = load_vector(residual, vector_column<T>(k), h);
    T* total = static_cast<T*>(a.total) + row * h;
#pragma unroll
    for (int k = 0; k < thread_vectors; ++k) {
      float one[n], other[n];
      widen_vector<T>(one, v[k]);
      widen_vector<T>(other, r[k]);
#pragma unroll
      for (int j = 0; j < n; ++j) one[j] += other[j];
      v[k] = narrow_vector<T>(one);  // the sum is rounded here: the norm sees what the next layer's residual will be
      if (vector_column<T>(k) < h) write(reinterpret_cast<uint4*>(total + vector_column<T>(k)), v[k]);
    }
  }
  // A sum for each vector, then a tree over vectors: independent chains of additions overlap, and the order is fixed.
  float squares_of[thread_vectors];
#pragma unroll
  for (int k = 0; k < thread_vectors; ++k) {
    float one[n];
    widen_vector<T>(one, v[k]);
    squares_of[k] = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) squares_of[k] = fused(one[j], one[j], squares_of[k]);
  }
  float squares[1] = {sum_of(squares_of)};
  uint4 factor[thread_vectors];
#pragma unroll
  for (int k = 0; k < thread_vectors; ++k) factor[k] = prefetch_factor<T>(a.factor, vector_column<T>(k), h, 1);
  block_sum(squares, sums);
  const float rstd = root_of_row<T>(squares[0] / float(h) + float(a.eps));
  if (threadIdx.x == 0) static_cast<float*>(a.rstd)[row] = rstd;
  T* y = static_cast<T*>(a.y) + row * h;
#pragma unroll
  for (int k = 0; k < thread_vectors; ++k) {
    float one[n];
    widen_vector<T>(one, v[k]);
#pragma unroll
    for (int j = 0; j < n; ++j) one[j] *= rstd;
    if (a.round_first) widen_vector<T>(one, narrow_vector<T>(one));
    float f[n];
    factor_at<T, plain>(f, a.factor, factor[k], vector_column<T>(k), h);
#pragma unroll
    for (int j = 0; j < n; ++j) one[j] *= f[j];
    store_vector(y, one, vector_column<T>(k), h);
  }
}

// A block does `block_rows` rows in order. Each thread has fixed columns, so the weight's gradient stays in its registers for
// all rows and is written once for each block; `summed` adds the blocks up. The next rows are copied to shared memory
// meanwhile. A row is widened from there twice, before and after the sum over the row: as float32 it would take 64 registers.
template <class T>
__global__ void __launch_bounds__(backward_threads(1), 1) rms_norm_bwd_held(const __grid_constant__ RmsNormBwd a, int depth) {
  constexpr int n = lanes<T>, thread_vectors = backward_vectors(1);
  const int h = int(a.rows.width);
  const Stages<thread_vectors> rows{a.added != nullptr ? 3 : 2, depth};
  Walk<3> next(a.rows, a.block_rows);
  const auto fetch = [&](int slot) {
    if (next.at < next.row_count) {
      uint4* const to = rows.row(slot);
      rows.fetch<T>(to, 0, a.gradient, next.offset[0], h);
      rows.fetch<T>(to, 1, a.x, next.offset[2], h);
      if (a.added != nullptr) rows.fetch<T>(to, 2, a.added, next.offset[1], h);
      next.step();
    }
    end_group();  // an empty group too, so that `await` can count groups
  };
  RowNumbers rstds(a.rstd, next.first, next.row_count);
  for (int ahead = 0; ahead + 1 < depth; ++ahead) fetch(ahead);
  float f[thread_vectors][n], of_factor[thread_vectors][n] = {};
#pragma unroll
  for (int k = 0; k < thread_vectors; ++k) factor_at<T, false>(f[k], a.factor, vector_column<T>(k), h, 1);
  const float share = 1 / float(h);
  int slot = 0, free = depth - 1, sums = 0;
  for (int at = 0; at < next.row_count; ++at) {
    fetch(free);
    free = rows.after(free);
    const float rstd = rstds.of(at);
    rows.await();
    const uint4* const ring_row = rows.row(slot);
    slot = rows.after(slot);
    float along_of[thread_vectors] = {};
#pragma unroll
    for (int k = 0; k < thread_vectors; ++k) {
      float g[n], v[n];
      staged_vector<T, thread_vectors>(g, ring_row, 0, k);
      staged_vector<T, thread_vectors>(v, ring_row, 1, k);
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
    for (int k = 0; k < thread_vectors; ++k) {
      float g[n], v[n];
      staged_vector<T, thread_vectors>(g, ring_row, 0, k);
      staged_vector<T, thread_vectors>(v, ring_row, 1, k);
#pragma unroll
      for (int j = 0; j < n; ++j) v[j] = fused(v[j], -back, g[j] * f[k][j]) * rstd;
      if (a.added != nullptr) {
        staged_vector<T, thread_vectors>(g, ring_row, 2, k);
#pragma unroll
        for (int j = 0; j < n; ++j) v[j] += g[j];
      }
      store_vector(of_x, v, vector_column<T>(k), h);
    }
  }
  if (a.partial == nullptr) return;
  float* partial = static_cast<float*>(a.partial) + int64_t(blockIdx.x) * h;
#pragma unroll
  for (int k = 0; k < thread_vectors; ++k) store_sums<T>(partial, of_factor[k], vector_column<T>(k), h);
}

// Any width, alignment and dtype. The sums of the weight's gradient are in shared memory beside the row, or in `partial`
// itself.
template <class T>
__global__ void __launch_bounds__(most_threads, 1)
    rms_norm_bwd(const __grid_constant__ RmsNormBwd a, bool vectorized, bool staged) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>;
  const int64_t h = a.rows.width, step = int64_t(blockDim.x) * n;
  BlockSums<T, 1> sums({static_cast<W*>(a.partial)}, h, staged);
  T* const staged_gradient = staged ? reinterpret_cast<T*>(sums.end()) + threadIdx.y * 2 * padded<T>(h) : nullptr;
  T* const staged_x = staged ? staged_gradient + padded<T>(h) : nullptr;
  const int64_t first = blockIdx.x * a.block_rows;
  const int64_t last = first + a.block_rows < a.rows.count ? first + a.block_rows : a.rows.count;
  for (int64_t row = first + threadIdx.y; row < last; row += blockDim.y) {
    int64_t offset[3];
    row_offsets(offset, a.rows, row);
    const T* gradient = static_cast<const T*>(a.gradient) + offset[0];
    const T* x = static_cast<const T*>(a.x) + offset[2];
    const W rstd = static_cast<const W*>(a.rstd)[row];
    W along[1] = {};
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W g[n], v[n];
      load(g, gradient + at, h - at, vectorized);
      load(v, x + at, h - at, vectorized);
      if (staged) {
        keep(staged_gradient + at, g);
        keep(staged_x + at, v);
      }
      W f[n];
      if (a.factor.values != nullptr) load_factor<T>(f, a.factor, at, h - at, vectorized);
      W products[n];
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const W normal = v[j] * rstd;
        products[j] = g[j] * normal;
        along[0] += (a.factor.values == nullptr ? g[j] : g[j] * f[j]) * normal;
      }
      sums.add(0, products, at, h - at, vectorized);
    }
    row_sum(along);
    const W mean = along[0] / W(h);
    T* of_x = static_cast<T*>(a.of_x) + row * h;
    const T* again_gradient = staged ? staged_gradient : gradient;
    const T* again_x = staged ? staged_x : x;
    for (int64_t at = threadIdx.x * n; at < h; at += step) {
      W g[n], v[n];
      load(g, again_gradient + at, staged ? n : h - at, vectorized || staged);
      load(v, again_x + at, staged ? n : h - at, vectorized || staged);
      if (a.factor.values != nullptr) {
        W f[n];
        load_factor<T>(f, a.factor, at, h - at, vectorized);
#pragma unroll
        for (int j = 0; j < n; ++j) g[j] *= f[j];
      }
#pragma unroll
      for (int j = 0; j < n; ++j) v[j] = (g[j] - v[j] * rstd * mean) * rstd;
      if (a.added != nullptr) {
        W more[n];
        load(more, static_cast<const T*>(a.added) + offset[1] + at, h - at, vectorized);
#pragma unroll
        for (int j = 0; j < n; ++j) v[j] += more[j];
      }
      store(of_x + at, v, h - at, vectorized);
    }
  }
  sums.finish();
}

}  // namespace

void run(const RmsNorm& a, const Device& device) {
  of_dtype(a.dtype, [&](auto element) {
    typedef decltype(element) T;
    const bool vectorized =
        aligned(a.rows, sizeof(T), {a.x, a.residual, a.factor.values, a.y, a.total}, 2) && a.rows.width % lanes<T> == 0;
    if constexpr (sizeof(T) <= most_register_bytes) {
      const int64_t vectors = a.rows.width / lanes<T>;
      if (vectorized && fits_registers(vectors, thread_vectors) && a.rows.count <= most_blocks) {
        const Shape shape{a.rows.count, register_threads(vectors, thread_vectors), 1, exchange_bytes};
        return start(device, is_plain(a.factor) ? rms_norm_held<T, true> : rms_norm_held<T, false>, shape, a);
      }
    }
    Shape shape = Shape::of_rows(quotient_up(a.rows.width, lanes<T>));
    const bool staged = stages(shape, padded<T>(a.rows.width) * sizeof(T), device.shared);
    shape.blocks = std::min(quotient_up(a.rows.count, shape.rows), most_blocks);
    start(device, rms_norm<T>, shape, a, vectorized, staged);
  });
}

void run(const RmsNormBwd& a, const Device& device) {
  of_dtype(a.dtype, [&](auto element) {
    typedef decltype(element) T;
    const int64_t blocks = quotient_up(a.rows.count, a.block_rows);
    const bool vectorized = aligned(a.rows, sizeof(T), {a.gradient, a.added, a.x, a.factor.values, a.of_x, a.partial}, 3) &&
                       a.rows.width % lanes<T> == 0;
    if constexpr (sizeof(T) <= most_register_bytes) {
      const int64_t vectors = a.rows.width / lanes<T>;
      if (vectorized && fits_registers(vectors, backward_vectors(1))) {
        const RegisterPlan plan = register_plan(vectors, backward_vectors(1), blocks, a.added != nullptr ? 3 : 2, device);
        if (plan.depth > 0) return start(device, rms_norm_bwd_held<T>, plan.shape, a, plan.depth);
      }
    }
    Shape shape = backward_shape(a.rows.width, lanes<T>);
    const int64_t row_bytes = 2 * padded<T>(a.rows.width) * sizeof(T) + BlockSums<T, 1>::bytes(a.rows.width);
    const bool staged = stages(shape, row_bytes, device.shared);
    shape.blocks = blocks;
    start(device, rms_norm_bwd<T>, shape, a, vectorized, staged);
  });
}

}  // namespace shardcomp::cuda
