// What norms have in common: which rows are whose, what stays in shared memory, and sums over the rows of a block.
#pragma once

#include <algorithm>

#include "device.h"

namespace shardcomp::cuda {
namespace {

DEVICE int64_t first_row() { return int64_t(blockIdx.x) * blockDim.y + threadIdx.y; }
DEVICE int64_t row_step() { return int64_t(gridDim.x) * blockDim.y; }

// Elements of a row in shared memory, a multiple of what is moved at once.
template <class T>
__host__ __device__ __forceinline__ int64_t padded(int64_t h) {
  return (h + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// Sums of `count` kinds over the rows of a block, for the gradients of what rows are multiplied by and added to: in shared memory
// where that is enough, each thread its own columns, else where they are to end. Null pointers ask for none.
template <class T, int count>
struct BlockSums {
  typedef Wide<T> W;
  static constexpr int n = lanes<T>;
  int64_t h;
  bool staged;
  W* made[count];
  W* held[count];

  static int64_t bytes(int64_t h) { return count * padded<T>(h) * int64_t(sizeof(W)); }

  __device__ __forceinline__ BlockSums(W* const (&partial)[count], int64_t h, bool staged) : h(h), staged(staged) {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      made[k] = partial[k] == nullptr ? nullptr : partial[k] + blockIdx.x * h;
      held[k] = made[k];
      if (staged) held[k] = reinterpret_cast<W*>(stage()) + (int64_t(threadIdx.y) * count + k) * padded<T>(h);
      if (made[k] == nullptr) continue;
      for (int64_t at = threadIdx.x * n; at < h; at += int64_t(blockDim.x) * n) {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          if (at + j < h) held[k][at + j] = 0;
        }
      }
    }
  }

  // What lies behind the sums of all rows.
  __device__ __forceinline__ unsigned char* behind() const { return stage() + blockDim.y * count * padded<T>(h) * sizeof(W); }

  __device__ __forceinline__ void add(int k, const W (&x)[n], int64_t at, int64_t left, bool whole) {
    if (made[k] == nullptr) return;
    W total[n];
    load(total, held[k] + at, left, whole || staged);
#pragma unroll
    for (int j = 0; j < n; ++j) total[j] += x[j];
    keep(held[k] + at, total, left, whole || staged);
  }

  // Every thread of the block comes here.
  __device__ __forceinline__ void finish() {
    if (!staged) return;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < count; ++k) {
      if (made[k] == nullptr) continue;
      const W* all = reinterpret_cast<const W*>(stage()) + k * padded<T>(h);
      for (int64_t at = threadIdx.y * blockDim.x + threadIdx.x; at < h; at += blockDim.x * blockDim.y) {
        W total = 0;
        for (int row = 0; row < blockDim.y; ++row) total += all[int64_t(row) * count * padded<T>(h) + at];
        made[k][at] = total;
      }
    }
  }
};

// On the host: whether so many bytes of each row at a time fit in shared memory, which is then asked for; else a block has one
// row at a time, since its sums are then made where they end.
inline bool stages(Shape& shape, int64_t bytes, int64_t shared) {
  const bool fits = shape.rows * bytes <= shared - exchange_bytes;
  if (fits) {
    shape.shared += shape.rows * bytes;
  } else {
    shape.rows = 1;
  }
  return fits;
}

// Where rows are whole vectors of 16 bytes, each thread of a block holds a few of them, and shared memory is left to what is on its
// way: a kernel's `held` says how many at most, the k-th `k * blockDim.x` vectors behind the first.

template <class T>
DEVICE int place_of(int k) {
  return (int(threadIdx.x) + k * int(blockDim.x)) * lanes<T>;
}

// The pair of numbers in a word, the first one in its lower half, and the word of two numbers: what a compiler makes of halves by
// themselves takes several times as long.
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
    uint32_t made;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(made) : "f"(b), "f"(a));
    return made;
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
    uint32_t made;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(made) : "f"(b), "f"(a));
    return made;
#else
    return Narrow<fp16>::of(a).bits | uint32_t(Narrow<fp16>::of(b).bits) << 16;
#endif
  }
};

template <class T>
DEVICE void widen_vector(float (&made)[lanes<T>], uint4 vector) {
  uint32_t words[4];
  memcpy(words, &vector, sizeof(words));
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int j = 0; j < 4; ++j) Pair<T>::widened(made[2 * j], made[2 * j + 1], words[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) made[j] = __uint_as_float(words[j]);
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
DEVICE uint4 vector_at(const T* p, int at, int h) {
  return at < h ? *reinterpret_cast<const uint4*>(p + at) : uint4{};
}

template <class T>
DEVICE void put_vector(T* p, const float (&x)[lanes<T>], int at, int h) {
  if (at < h) write(reinterpret_cast<uint4*>(p + at), narrow_vector<T>(x));
}

template <class T>
DEVICE void put_sums(float* p, const float (&x)[lanes<T>], int at, int h) {
#pragma unroll
  for (int j = 0; j < lanes<T>; j += 4) {
    const float four[4] = {x[j], x[j + 1], x[j + 2], x[j + 3]};
    put_vector(p, four, at + j, h);
  }
}

// The numbers of a factor that a vector meets, in two steps: what is narrow is asked for early and waited for late. Where there is
// no factor they are `none`, which T can hold.
template <class T>
DEVICE uint4 ask_factor(const Factor& factor, int at, int h, float none) {
  float x[lanes<T>];
#pragma unroll
  for (int j = 0; j < lanes<T>; ++j) x[j] = none;
  const uint4 nothing = narrow_vector<T>(x);
  const bool there = factor.held != nullptr;
  const uint4 asked = there && factor.narrow && at < h ? fetched(static_cast<const T*>(factor.held) + at) : uint4{};
  return {there ? asked.x : nothing.x, there ? asked.y : nothing.y, there ? asked.z : nothing.z, there ? asked.w : nothing.w};
}
// plain: as below, so that what is asked for is all there is to it.
template <class T, bool plain>
DEVICE void factor_at(float (&made)[lanes<T>], const Factor& factor, uint4 asked, int at, int h) {
  constexpr int n = lanes<T>;
  widen_vector<T>(made, asked);
  if (plain || factor.held == nullptr) return;
  if (!factor.narrow) {
#pragma unroll
    for (int j = 0; j < n; j += 4) {
      float four[4];
      widen_vector<float>(four, at < h ? vector_at(static_cast<const float*>(factor.held), at + j, h) : uint4{});
#pragma unroll
      for (int i = 0; i < 4; ++i) made[j + i] = four[i];
    }
  }
  if (factor.offset != 0) {
#pragma unroll
    for (int j = 0; j < n; ++j) made[j] += float(factor.offset);
    if (factor.narrow && factor.rounded) widen_vector<T>(made, narrow_vector<T>(made));
  }
}
template <class T, bool plain>
DEVICE void factor_at(float (&made)[lanes<T>], const Factor& factor, int at, int h, float none) {
  factor_at<T, plain>(made, factor, ask_factor<T>(factor, at, h, none), at, h);
}

// On the host: whether a factor, if there is one, is just what its memory holds as a T.
inline bool is_plain(const Factor& factor) { return factor.held == nullptr || (factor.narrow && factor.offset == 0); }

// The sum of a few numbers, in pairs.
template <int n>
DEVICE float sum_of(const float (&x)[n]) {
  float held[n];
#pragma unroll
  for (int j = 0; j < n; ++j) held[j] = x[j];
#pragma unroll
  for (int apart = n / 2; apart > 0; apart /= 2) {
#pragma unroll
    for (int j = 0; j < apart; ++j) held[j] += held[j + apart];
  }
  return held[0];
}

// The sums over a block, which all threads get. One call and the next have places of their own in shared memory, so that one
// barrier is enough: a thread that comes to the next but one has seen that all were at the next.
template <int count>
DEVICE void block_sum(float (&x)[count], int& calls) {
  static_assert(2 * count * most_threads / warp * sizeof(float) <= exchange_bytes);
  warp_sum(x);
  if (alone()) return;
  const int warps = blockDim.x / warp;
  float* const held = exchange<float>() + calls++ % 2 * count * (most_threads / warp);
  if (threadIdx.x % warp == 0) {
#pragma unroll
    for (int k = 0; k < count; ++k) held[threadIdx.x / warp * count + k] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < count; ++k) x[k] = held[k];
  for (int at = 1; at < warps; ++at) {
#pragma unroll
    for (int k = 0; k < count; ++k) x[k] += held[at * count + k];
  }
}

// Copies of 16 bytes from the device's memory into shared memory that go on beside what a thread does, in groups; zeros where there
// is nothing.
DEVICE void copy(uint4* to, const void* from, bool there) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(uint32_t(__cvta_generic_to_shared(to))), "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
               : "memory");
#elif defined(SHARDCOMP_EMULATED)
  emulation::block().copy(to, there ? from : nullptr);
#endif
}
DEVICE void end_group() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" : : : "memory");
#elif defined(SHARDCOMP_EMULATED)
  emulation::block().end_group();
#endif
}
// Until all groups have come but the last few.
template <int but>
DEVICE void await_groups() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" : : "n"(but) : "memory");
#elif defined(SHARDCOMP_EMULATED)
  emulation::block().await_groups(but);
#endif
}

// The rows of a block: how many there are and where each lies in some tensors, from the first one on.
template <int count>
struct Walk {
  const Rows& rows;
  const int64_t first;
  const int many;
  int at = 0;
  int64_t offset[count];

  __device__ __forceinline__ Walk(const Rows& rows, int64_t block_rows)
      : rows(rows),
        first(blockIdx.x * block_rows),
        many(int(rows.count - first < block_rows ? rows.count - first : block_rows)) {
    place(offset, rows, first);
  }
  __device__ __forceinline__ void step() {
    ++at;
    if (rows.dims > 1) return place(offset, rows, first + at);
#pragma unroll
    for (int t = 0; t < count; ++t) offset[t] += rows.strides[t][0];
  }
};

// A number of each row of a block, of which each lane of a warp holds one. Were it read row by row, a compiler would see that all
// threads read the same, and would wait for it there.
struct RowNumbers {
  const float* const numbers;  // that of the block's first row
  const int many;
  float mine;

  __device__ __forceinline__ RowNumbers(const void* numbers, int64_t first, int many)
      : numbers(static_cast<const float*>(numbers) + first), many(many) {
    hold(0);
  }
  __device__ __forceinline__ void hold(int at) {
    at += threadIdx.x % warp;
    mine = at < many ? numbers[at] : 0;
  }
  // All threads of a block take one row after another.
  __device__ __forceinline__ float of(int at) {
    const int lane = at % warp;
    if (lane == 0 && at != 0) hold(at);
    return __shfl_sync(0xffffffffu, mine, lane);
  }
};

// The rows that a block goes through, those of a few tensors side by side: while it is at one, the next ones are on their way. Each
// thread reads what it has copied itself, so that none waits for another.
template <int held>
struct Stages {
  int tensors, depth;  // so many rows have a place in shared memory

  // A thread's first vector of a row, the others follow `blockDim.x` apart, those of one tensor before those of the next.
  __device__ __forceinline__ uint4* row(int slot) const {
    return reinterpret_cast<uint4*>(stage()) + slot * tensors * held * int(blockDim.x) + int(threadIdx.x);
  }
  __device__ __forceinline__ int after(int slot) const { return slot + 1 == depth ? 0 : slot + 1; }

  template <class T>
  __device__ __forceinline__ void fetch(uint4* to, int tensor, const void* base, int64_t offset, int h) const {
    const T* const from = static_cast<const T*>(base) + offset;
#pragma unroll
    for (int k = 0; k < held; ++k) {
      const int at = place_of<T>(k);
      copy(to + (tensor * held + k) * int(blockDim.x), from + at, at < h);
    }
  }
  __device__ __forceinline__ void await() const {
    if (depth == 2) return await_groups<1>();
    if (depth == 3) return await_groups<2>();
    await_groups<3>();
  }
};

// A vector of a row.
template <class T, int held>
DEVICE void staged_vector(float (&made)[lanes<T>], const uint4* row, int tensor, int k) {
  widen_vector<T>(made, row[(tensor * held + k) * int(blockDim.x)]);
}

// On the host: how a block holds rows of so many vectors; `depth` is 0 where it cannot.
constexpr int most_depth = 4;

struct Holding {
  Shape shape;
  int depth;
};

inline int holding_threads(int64_t vectors, int held) { return int(quotient_up(vectors, held * warp) * warp); }

// Vectors of a thread in a backward, which has registers for a factor and so many sums of its columns beside, and the threads of a
// multiprocessor that have them.
__host__ __device__ constexpr int held_back(int sums) { return sums == 1 ? 4 : 2; }
__host__ __device__ constexpr int held_threads(int sums) { return sums == 1 ? 512 : 768; }

// Elements of more bytes are computed in float64, which a thread has no registers to hold.
constexpr int most_held_bytes = 4;

// Whether rows are held; those of a few vectors are left to single warps, several of which are a block.
inline bool holds(int64_t vectors, int held) { return vectors > 2 * warp && vectors <= int64_t(held) * most_threads; }

// As many rows on their way as the blocks of a multiprocessor have shared memory for, each of `tensors` tensors.
inline Holding holding(int64_t vectors, int held, int64_t blocks, int tensors, const Device& device) {
  const int threads = holding_threads(vectors, held);
  const int64_t row = int64_t(threads) * held * 16 * tensors, beside = quotient_up(blocks, device.multiprocessors);
  const int64_t shared = device.shared / std::max<int64_t>(1, beside) - exchange_bytes - (1 << 10);
  const int64_t depth = std::min<int64_t>(most_depth, std::max<int64_t>(2, shared / row));
  const bool fits = depth * row <= device.shared - exchange_bytes;
  return {{blocks, threads, 1, exchange_bytes + depth * row}, fits ? int(depth) : 0};
}

// A backward has more to do for each element.
inline Shape backward_shape(int64_t width, int n) {
  Shape shape = Shape::of_rows(quotient_up(width, n));
  if (shape.threads > warp) shape.threads = std::min(2 * shape.threads, most_threads);
  return shape;
}

}  // namespace
}  // namespace shardcomp::cuda
