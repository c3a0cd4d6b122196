// The common parts of RMS norm and layer norm: rows of a block, rows in shared memory or registers, sums over rows.
//
// Each norm has two kernels for each direction. The general one takes any width, alignment and dtype; it keeps a row in shared
// memory if it fits, else it reads the row twice. The one called `_held` takes rows that are whole vectors of 16 bytes and
// short enough: each thread keeps its vectors in registers, and shared memory is free to prefetch the next rows.
#pragma once

#include <algorithm>

#include "device.h"

namespace shardcomp::cuda {
namespace {

DEVICE int64_t first_row() { return int64_t(blockIdx.x) * blockDim.y + threadIdx.y; }
DEVICE int64_t row_step() { return int64_t(gridDim.x) * blockDim.y; }

// The elements of a row in shared memory, rounded up to whole vectors so that the next row is aligned.
template <class T>
__host__ __device__ __forceinline__ int64_t padded(int64_t h) {
  return (h + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// Sums over the rows of a block, `count` for each column: the gradients of weight and bias, in the wide dtype. They grow in
// shared memory where it suffices, else in `partial` itself. Each thread owns its columns, so that adding a row needs no
// barrier and no atomic, and the order of additions is fixed. A null pointer means that its gradient is not needed.
template <class T, int count>
struct BlockSums {
  typedef Wide<T> W;
  static constexpr int n = lanes<T>;
  int64_t h;
  bool staged;
  W* out[count];   // where the sums of this block end
  W* sums[count];  // where they grow

  static int64_t bytes(int64_t h) { return count * padded<T>(h) * int64_t(sizeof(W)); }

  __device__ __forceinline__ BlockSums(W* const (&partial)[count], int64_t h, bool staged) : h(h), staged(staged) {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      out[k] = partial[k] == nullptr ? nullptr : partial[k] + blockIdx.x * h;
      sums[k] = out[k];
      if (staged) sums[k] = reinterpret_cast<W*>(stage()) + (int64_t(threadIdx.y) * count + k) * padded<T>(h);
      if (out[k] == nullptr) continue;
      for (int64_t at = threadIdx.x * n; at < h; at += int64_t(blockDim.x) * n) {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          if (at + j < h) sums[k][at + j] = 0;
        }
      }
    }
  }

  // The shared memory after the sums.
  __device__ __forceinline__ unsigned char* end() const { return stage() + blockDim.y * count * padded<T>(h) * sizeof(W); }

  __device__ __forceinline__ void add(int k, const W (&x)[n], int64_t at, int64_t left, bool vectorized) {
    if (out[k] == nullptr) return;
    W total[n];
    load(total, sums[k] + at, left, vectorized || staged);
#pragma unroll
    for (int j = 0; j < n; ++j) total[j] += x[j];
    keep(sums[k] + at, total, left, vectorized || staged);
  }

  // Adds up the sums of the block's warps, in order. All threads of the block must call it: it has a barrier.
  __device__ __forceinline__ void finish() {
    if (!staged) return;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < count; ++k) {
      if (out[k] == nullptr) continue;
      const W* first_row = reinterpret_cast<const W*>(stage()) + k * padded<T>(h);
      for (int64_t at = threadIdx.y * blockDim.x + threadIdx.x; at < h; at += blockDim.x * blockDim.y) {
        W total = 0;
        for (int row = 0; row < blockDim.y; ++row) total += first_row[int64_t(row) * count * padded<T>(h) + at];
        out[k][at] = total;
      }
    }
  }
};

// On the host: whether `bytes` for each row fit in shared memory; if so, the shape requests them. Else a block takes one row at
// a time, because two warps would then add to the same sums in global memory.
inline bool stages(Shape& shape, int64_t bytes, int64_t shared) {
  const bool fits = shape.rows * bytes <= shared - exchange_bytes;
  if (fits) {
    shape.shared += shape.rows * bytes;
  } else {
    shape.rows = 1;
  }
  return fits;
}

// The kernels that keep rows in registers. A thread has up to `thread_vectors` vectors of 16 bytes of a row, `blockDim.x`
// vectors apart, so that neighbouring threads read neighbouring vectors and a warp's load is 512 contiguous bytes.

// The first column of a thread's k-th vector.
template <class T>
DEVICE int vector_column(int k) {
  return (int(threadIdx.x) + k * int(blockDim.x)) * lanes<T>;
}

// Two 16-bit numbers in one 32-bit word, the first in the lower half. Both are converted together: nvcc's code for single
// halves takes several times as long.
template <class T>
struct Pair;
template <>
struct Pair<bf16> {
  static __device__ __forceinline__ void widened(float& a, float& b, uint32_t word) {
    a = __uint_as_float(word << 16);
    b = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t narrowed(float a, float b) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
    return word;
#else
    return Narrow<bf16>::of(a).bits | uint32_t(Narrow<bf16>::of(b).bits) << 16;
#endif
  }
};
template <>
struct Pair<fp16> {
  static __device__ __forceinline__ void widened(float& a, float& b, uint32_t word) {
    a = widen(fp16{uint16_t(word)});
    b = widen(fp16{uint16_t(word >> 16)});
  }
  static __device__ __forceinline__ uint32_t narrowed(float a, float b) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
    return word;
#else
    return Narrow<fp16>::of(a).bits | uint32_t(Narrow<fp16>::of(b).bits) << 16;
#endif
  }
};

template <class T>
DEVICE void widen_vector(float (&values)[lanes<T>], uint4 vector) {
  uint32_t words[4];
  memcpy(words, &vector, sizeof(words));
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int j = 0; j < 4; ++j) Pair<T>::widened(values[2 * j], values[2 * j + 1], words[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = __uint_as_float(words[j]);
  }
}

template <class T>
DEVICE uint4 narrow_vector(const float (&x)[lanes<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (sizeof(T) == 2) {
      words[j] = Pair<T>::narrowed(x[2 * j], x[2 * j + 1]);
    } else {
      words[j] = __float_as_uint(x[j]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

template <class T>
DEVICE uint4 load_vector(const T* p, int at, int h) {
  return at < h ? *reinterpret_cast<const uint4*>(p + at) : uint4{};
}

template <class T>
DEVICE void store_vector(T* p, const float (&x)[lanes<T>], int at, int h) {
  if (at < h) write(reinterpret_cast<uint4*>(p + at), narrow_vector<T>(x));
}

template <class T>
DEVICE void store_sums(float* p, const float (&x)[lanes<T>], int at, int h) {
#pragma unroll
  for (int j = 0; j < lanes<T>; j += 4) {
    const float four[4] = {x[j], x[j + 1], x[j + 2], x[j + 3]};
    store_vector(p, four, at + j, h);
  }
}

// The values of a factor for one vector, in two steps. The first issues the load of a narrow factor before the sums of a row,
// the second widens it after them, so that the load overlaps the reduction. Without a factor the values are `none`, which T
// represents.
template <class T>
DEVICE uint4 prefetch_factor(const Factor& factor, int at, int h, float none) {
  float x[lanes<T>];
#pragma unroll
  for (int j = 0; j < lanes<T>; ++j) x[j] = none;
  const uint4 nothing = narrow_vector<T>(x);
  const bool present = factor.values != nullptr;
  const uint4 packed = present && factor.narrow && at < h ? fetched(static_cast<const T*>(factor.values) + at) : uint4{};
  return {present ? packed.x : nothing.x, present ? packed.y : nothing.y,
          present ? packed.z : nothing.z, present ? packed.w : nothing.w};
}
// plain: the factor is narrow and has no offset (see is_plain), so that the code for the other kinds is left out.
template <class T, bool plain>
DEVICE void factor_at(float (&values)[lanes<T>], const Factor& factor, uint4 packed, int at, int h) {
  constexpr int n = lanes<T>;
  widen_vector<T>(values, packed);
  if (plain || factor.values == nullptr) return;
  if (!factor.narrow) {
#pragma unroll
    for (int j = 0; j < n; j += 4) {
      float four[4];
      widen_vector<float>(four, at < h ? load_vector(static_cast<const float*>(factor.values), at + j, h) : uint4{});
#pragma unroll
      for (int i = 0; i < 4; ++i) values[j + i] = four[i];
    }
  }
  if (factor.offset != 0) {
#pragma unroll
    for (int j = 0; j < n; ++j) values[j] += float(factor.offset);
    if (factor.narrow && factor.rounded) widen_vector<T>(values, narrow_vector<T>(values));
  }
}
template <class T, bool plain>
DEVICE void factor_at(float (&values)[lanes<T>], const Factor& factor, int at, int h, float none) {
  factor_at<T, plain>(values, factor, prefetch_factor<T>(factor, at, h, none), at, h);
}

// On the host: whether the values of a factor, if there is one, are used as they are, as a T.
inline bool is_plain(const Factor& factor) { return factor.values == nullptr || (factor.narrow && factor.offset == 0); }

// The sum of n numbers as a tree: log2(n) dependent additions instead of n, and a smaller rounding error.
template <int n>
DEVICE float sum_of(const float (&x)[n]) {
  float sums[n];
#pragma unroll
  for (int j = 0; j < n; ++j) sums[j] = x[j];
#pragma unroll
  for (int distance = n / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int j = 0; j < distance; ++j) sums[j] += sums[j + distance];
  }
  return sums[0];
}

// The sums over a block; all threads get them. Successive calls alternate between two places in shared memory, so that one
// barrier per call is enough: a thread that overwrites a place, two calls later, has passed the barrier of the call between,
// and so all threads have read it.
template <int count>
DEVICE void block_sum(float (&x)[count], int& calls) {
  static_assert(2 * count * most_threads / warp * sizeof(float) <= exchange_bytes);
  warp_sum(x);
  if (alone()) return;
  const int warps = blockDim.x / warp;
  float* const slots = exchange<float>() + calls++ % 2 * count * (most_threads / warp);
  if (threadIdx.x % warp == 0) {
#pragma unroll
    for (int k = 0; k < count; ++k) slots[threadIdx.x / warp * count + k] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < count; ++k) x[k] = slots[k];
  for (int at = 1; at < warps; ++at) {
#pragma unroll
    for (int k = 0; k < count; ++k) x[k] += slots[at * count + k];
  }
}

// Asynchronous copies of 16 bytes from global to shared memory (cp.async, sm_80 and later), in groups. They pass no register,
// so rows can be prefetched without taking registers from the row at hand. Not `present`: zeros are written, and nothing is
// read.
DEVICE void copy(uint4* to, const void* from, bool present) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(uint32_t(__cvta_generic_to_shared(to))), "l"(__cvta_generic_to_global(from)), "r"(present ? 16 : 0)
               : "memory");
#elif defined(SHARDCOMP_EMULATED)
  emulation::block().copy(to, present ? from : nullptr);
#endif
}
DEVICE void end_group() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" : : : "memory");
#elif defined(SHARDCOMP_EMULATED)
  emulation::block().end_group();
#endif
}
// Waits until all groups have arrived but the last few. The number must be an immediate of the instruction.
template <int but>
DEVICE void await_groups() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" : : "n"(but) : "memory");
#elif defined(SHARDCOMP_EMULATED)
  emulation::block().await_groups(but);
#endif
}

// The rows of a block, in order, with their offsets in `count` tensors.
template <int count>
struct Walk {
  const Rows& rows;
  const int64_t first;
  const int row_count;
  int at = 0;
  int64_t offset[count];

  __device__ __forceinline__ Walk(const Rows& rows, int64_t block_rows)
      : rows(rows),
        first(blockIdx.x * block_rows),
        row_count(int(rows.count - first < block_rows ? rows.count - first : block_rows)) {
    row_offsets(offset, rows, first);
  }
  __device__ __forceinline__ void step() {
    ++at;
    // With one leading dimension, which is the rule, a step is one addition instead of divisions.
    if (rows.dims > 1) return row_offsets(offset, rows, first + at);
#pragma unroll
    for (int t = 0; t < count; ++t) offset[t] += rows.strides[t][0];
  }
};

// One number for each row of a block, such as rstd. The lanes of a warp load those of 32 rows at once and pass them round by
// shuffles. Loading the number row by row stalls every row for the latency of memory.
struct RowNumbers {
  const float* const numbers;  // that of the block's first row
  const int row_count;
  float lane_number;

  __device__ __forceinline__ RowNumbers(const void* numbers, int64_t first, int row_count)
      : numbers(static_cast<const float*>(numbers) + first), row_count(row_count) {
    refill(0);
  }
  __device__ __forceinline__ void refill(int at) {
    at += threadIdx.x % warp;
    lane_number = at < row_count ? numbers[at] : 0;
  }
  // The number of row `at`. All threads of a warp must ask for the same rows, in order.
  __device__ __forceinline__ float of(int at) {
    const int lane = at % warp;
    if (lane == 0 && at != 0) refill(at);
    return __shfl_sync(0xffffffffu, lane_number, lane);
  }
};

// A ring of `depth` rows in shared memory, each with its vectors of several tensors: while a block computes one row, the copies
// of the next ones are in flight. Each thread reads only what it copied itself, so that no barrier is needed.
template <int thread_vectors>
struct Stages {
  int tensors, depth;  // depth: rows of the ring

  // A thread's first vector of a row. Its others follow at steps of `blockDim.x`, one tensor after the other: neighbouring
  // threads then access neighbouring 16 bytes, without bank conflicts.
  __device__ __forceinline__ uint4* row(int slot) const {
    return reinterpret_cast<uint4*>(stage()) + slot * tensors * thread_vectors * int(blockDim.x) + int(threadIdx.x);
  }
  __device__ __forceinline__ int after(int slot) const { return slot + 1 == depth ? 0 : slot + 1; }

  template <class T>
  __device__ __forceinline__ void fetch(uint4* to, int tensor, const void* base, int64_t offset, int h) const {
    const T* const from = static_cast<const T*>(base) + offset;
#pragma unroll
    for (int k = 0; k < thread_vectors; ++k) {
      const int at = vector_column<T>(k);
      copy(to + (tensor * thread_vectors + k) * int(blockDim.x), from + at, at < h);
    }
  }
  __device__ __forceinline__ void await() const {
    if (depth == 2) return await_groups<1>();
    if (depth == 3) return await_groups<2>();
    await_groups<3>();
  }
};

// The k-th vector of a tensor in a staged row.
template <class T, int thread_vectors>
DEVICE void staged_vector(float (&values)[lanes<T>], const uint4* row, int tensor, int k) {
  widen_vector<T>(values, row[(tensor * thread_vectors + k) * int(blockDim.x)]);
}

// On the host: the launch of a backward that keeps rows in registers; `depth` is 0 where two rows do not fit in shared memory.
constexpr int most_depth = 4;

struct RegisterPlan {
  Shape shape;
  int depth;
};

inline int register_threads(int64_t vectors, int thread_vectors) {
  return int(quotient_up(vectors, thread_vectors * warp) * warp);
}

// The vectors of a thread in a backward, and the threads of a block that its launch bounds allow. Beside a row, registers hold
// a factor and `sums` float32 sums for each column: 4 vectors of bf16 are 32 columns, so two sums leave room for half as many
// vectors.
__host__ __device__ constexpr int backward_vectors(int sums) { return sums == 1 ? 4 : 2; }
__host__ __device__ constexpr int backward_threads(int sums) { return sums == 1 ? 512 : 768; }

// Wider elements (float64) would need twice the registers.
constexpr int most_register_bytes = 4;

// Whether rows fit in the registers of a block. Short rows (up to 64 vectors) are left to the general kernel, where a block has
// a row for each of its warps, or fewer threads.
inline bool fits_registers(int64_t vectors, int thread_vectors) {
  return vectors > 2 * warp && vectors <= int64_t(thread_vectors) * most_threads;
}

// As many rows in flight, up to 4, as the shared memory of a multiprocessor allows the blocks that run on it side by side.
inline RegisterPlan register_plan(int64_t vectors, int thread_vectors, int64_t blocks, int tensors, const Device& device) {
  const int threads = register_threads(vectors, thread_vectors);
  const int64_t row = int64_t(threads) * thread_vectors * 16 * tensors, beside = quotient_up(blocks, device.multiprocessors);
  // A block also takes 1 KiB that the system reserves.
  const int64_t shared = device.shared / std::max<int64_t>(1, beside) - exchange_bytes - (1 << 10);
  const int64_t depth = std::min<int64_t>(most_depth, std::max<int64_t>(2, shared / row));
  const bool fits = depth * row <= device.shared - exchange_bytes;
  return {{blocks, threads, 1, exchange_bytes + depth * row}, fits ? int(depth) : 0};
}

// Twice the threads of a forward: a backward reads two or three tensors and does more work for each element.
inline Shape backward_shape(int64_t width, int n) {
  Shape shape = Shape::of_rows(quotient_up(width, n));
  if (shape.threads > warp) shape.threads = std::min(2 * shape.threads, most_threads);
  return shape;
}

}  // namespace
}  // namespace shardcomp::cuda
