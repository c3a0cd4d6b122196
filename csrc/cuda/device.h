// What every CUDA kernel is made of: the four dtypes to and from what they are computed in, 16 bytes at a time where that can be,
// rows and their places, and sums over threads that have the same bits every time.
//
// Plain C++ but for a few words that the emulation gives a meaning on the host, so that the same sources run there.
#pragma once

#include <type_traits>

#include "kernels.h"

#if defined(SHARDCOMP_EMULATED)
#include "../emulation/device.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

extern __shared__ __align__(16) unsigned char shardcomp_shared_memory[];
#define SHARED_MEMORY shardcomp_shared_memory
#define ALIGNED(p, bytes) (p)
#endif

#define DEVICE static __device__ __forceinline__

namespace shardcomp::cuda {
// Each source has its own, so that a linker never takes a function of one for that of another.
namespace {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The type that a dtype is computed in.
template <class T>
struct Widened {
  typedef float type;
};
template <>
struct Widened<double> {
  typedef double type;
};
template <class T>
using Wide = typename Widened<T>::type;

// So many elements are 16 bytes, and what a thread takes at a time.
template <class T>
constexpr int lanes = 16 / sizeof(T);

DEVICE float widen(float x) { return x; }
DEVICE double widen(double x) { return x; }
DEVICE float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DEVICE float widen(fp16 x) {
#if defined(__CUDA_ARCH__)
  float made;
  asm("cvt.f32.f16 %0, %1;" : "=f"(made) : "h"(x.bits));
  return made;
#else
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t infinite = magnitude >= 0x0f800000u ? 0x7f800000u : 0;
  const uint32_t unbiased = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
  return __uint_as_float(unbiased | infinite | ((x.bits & 0x8000u) << 16));
#endif
}

// To nearest, ties to even.
template <class T>
struct Narrow {
  static __device__ __forceinline__ T of(Wide<T> x) { return x; }
};
template <>
struct Narrow<bf16> {
  static __device__ __forceinline__ bf16 of(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    bf16 made;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(made.bits) : "f"(x));
    return made;
#else
    const uint32_t bits = __float_as_uint(x);
    return {uint16_t(x != x ? 0x7fc0u : (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16)};
#endif
  }
};
template <>
struct Narrow<fp16> {
  static __device__ __forceinline__ fp16 of(float x) {
#if defined(__CUDA_ARCH__)
    fp16 made;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(made.bits) : "f"(x));
    return made;
#else
    const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
    uint32_t made = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    if (magnitude < 0x38800000u) made = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    if (magnitude >= 0x47800000u) made = 0x7c00u;
    if (magnitude > 0x7f800000u) made = 0x7e00u;
    return {uint16_t(made | ((bits >> 16) & 0x8000u))};
#endif
  }
};

// As a T holds it.
template <class T>
DEVICE Wide<T> rounded(Wide<T> x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  constexpr bool as_upper = std::is_same_v<T, bf16>;
#else
  constexpr bool as_upper = false;
#endif
  if constexpr (as_upper) {  // of two numbers, which is this number; one alone is converted by a unit that is four times as slow
    uint32_t made;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(made) : "f"(x), "f"(0.0f));
    return __uint_as_float(made);
  } else {
    return widen(Narrow<T>::of(x));
  }
}

DEVICE float square_root(float x) { return sqrtf(x); }
DEVICE double square_root(double x) { return sqrt(x); }
DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }
DEVICE float reciprocal_root(float x) { return rsqrtf(x); }
DEVICE double reciprocal_root(double x) { return 1 / sqrt(x); }

// 1 / √x for rows of T. rsqrtf may be off in its last two bits, which all of a row then shares: it is what a model computes rows of
// 16 bits with, but those of 32 bits have one step of Newton's behind it, from what is left over of x·rsqrt².
template <class T>
DEVICE Wide<T> root_of_row(Wide<T> x) {
  const Wide<T> guess = reciprocal_root(x);
  if constexpr (sizeof(T) != 4) return guess;
  const Wide<T> once = x * guess, lost = fused(x, guess, -once);
  const Wide<T> left = fused(-once, guess, Wide<T>(1)) - lost * guess;
  return left == left ? fused(guess / 2, left, guess) : guess;
}
DEVICE float exponential(float x) { return expf(x); }
DEVICE double exponential(double x) { return exp(x); }

// What so many bytes are moved as, at most 16 at once.
template <int bytes>
struct Moved {
  typedef uint4 type;
};
template <>
struct Moved<8> {
  typedef uint2 type;
};

// n elements that lie together.
template <class T, int n>
struct Pack {
  static constexpr int bytes = sizeof(T) * n;
  typedef typename Moved<bytes>::type Word;
  static constexpr int count = bytes / sizeof(Word);
  static_assert(bytes % sizeof(Word) == 0, "a pack is of whole words");
  T held[n];
};

// What a pack holds, and back.
template <class T, int n, class W>
DEVICE void widen(W (&made)[n], const Pack<T, n>& pack) {
  if constexpr (std::is_same_v<T, bf16> && n % 2 == 0) {
    uint32_t pairs[n / 2];
    memcpy(pairs, &pack, sizeof(pairs));
#pragma unroll
    for (int j = 0; j < n; ++j) made[j] = __uint_as_float(j % 2 == 0 ? pairs[j / 2] << 16 : pairs[j / 2] & 0xffff0000u);
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) made[j] = widen(pack.held[j]);
  }
}
template <class T, int n, class W>
DEVICE void narrow(Pack<T, n>& pack, const W (&made)[n]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  constexpr bool by_two = sizeof(T) == 2 && n % 2 == 0;
#else
  constexpr bool by_two = false;
#endif
  if constexpr (by_two) {
    uint32_t pairs[n / 2];
#pragma unroll
    for (int j = 0; j < n; j += 2) {
      if constexpr (std::is_same_v<T, bf16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pairs[j / 2]) : "f"(made[j + 1]), "f"(made[j]));
      } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pairs[j / 2]) : "f"(made[j + 1]), "f"(made[j]));
      }
    }
    memcpy(&pack, pairs, sizeof(pairs));
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) pack.held[j] = Narrow<T>::of(made[j]);
  }
}

// The first `left` of n elements at `p`, zeros behind them. whole: `p` is aligned to as much as is moved at once.
template <int n, class T, class W>
DEVICE void load(W (&made)[n], const T* p, int64_t left, bool whole) {
  typedef Pack<T, n> P;
  P pack;
  if (whole && left >= n) {
    typename P::Word words[P::count];
#pragma unroll
    for (int k = 0; k < P::count; ++k) words[k] = reinterpret_cast<const typename P::Word*>(p)[k];
    memcpy(&pack, words, sizeof(pack));
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) pack.held[j] = j < left ? p[j] : T{};
  }
  widen(made, pack);
}

// One word into the device's memory. Were it written in C++, a compiler would find the same elements stored one by one in what
// is done where they are not aligned, and do that in either case.
DEVICE void write(uint4* p, uint4 x) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(p)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
#else
  *static_cast<uint4*>(ALIGNED(p, 16)) = x;
#endif
}
DEVICE void write(uint2* p, uint2 x) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(__cvta_generic_to_global(p)), "r"(x.x), "r"(x.y) : "memory");
#else
  *p = x;
#endif
}

// 16 bytes as they lie, and what they hold: several can be on their way before the first are looked at.
DEVICE uint4 fetched(const void* p) { return *static_cast<const uint4*>(ALIGNED(p, 16)); }
template <class T, class W>
DEVICE void unpack(W (&made)[lanes<T>], uint4 word) {
  Pack<T, lanes<T>> pack;
  memcpy(&pack, &word, sizeof(pack));
  widen(made, pack);
}

// Into shared memory, or into what may be that: n elements, and where they are not `whole` no more than `left`.
template <int n, class T, class W>
DEVICE void keep(T* p, const W (&made)[n], int64_t left = n, bool whole = true) {
  typedef Pack<T, n> P;
  P pack;
  narrow(pack, made);
  if (whole && left >= n) {
    typename P::Word words[P::count];
    memcpy(words, &pack, sizeof(pack));
#pragma unroll
    for (int k = 0; k < P::count; ++k) reinterpret_cast<typename P::Word*>(p)[k] = words[k];
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (j < left) p[j] = pack.held[j];
    }
  }
}

template <int n, class T, class W>
DEVICE void store(T* p, const W (&made)[n], int64_t left, bool whole) {
  typedef Pack<T, n> P;
  if (!whole || left < n) return keep(p, made, left, false);
  P pack;
  narrow(pack, made);
  typename P::Word words[P::count];
  memcpy(words, &pack, sizeof(pack));
#pragma unroll
  for (int k = 0; k < P::count; ++k) write(reinterpret_cast<typename P::Word*>(p) + k, words[k]);
}

// The numbers of a factor that n elements of a row meet, the first of them at `at`.
template <class T, int n>
DEVICE void load_factor(Wide<T> (&made)[n], const Factor& factor, int64_t at, int64_t left, bool whole) {
  typedef Wide<T> W;
  if (factor.narrow) {
    load(made, static_cast<const T*>(factor.held) + at, left, whole);
  } else {
    load(made, static_cast<const W*>(factor.held) + at, left, whole);
  }
  if (factor.offset != 0) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      made[j] += W(factor.offset);
      if (factor.narrow && factor.rounded) made[j] = rounded<T>(made[j]);
    }
  }
}

// at becomes at / size, and what is left is returned.
DEVICE int64_t divided(int64_t& at, int64_t size) {
  const int64_t whole = at;
  if (((whole | size) >> 31) == 0) {
    at = uint32_t(whole) / uint32_t(size);
  } else {
    at = whole / size;
  }
  return whole - at * size;
}

// Where a row lies in each of some tensors.
template <int count>
DEVICE void place(int64_t (&offset)[count], const Rows& rows, int64_t row) {
#pragma unroll
  for (int t = 0; t < count; ++t) offset[t] = 0;
#pragma unroll 1
  for (int d = rows.dims - 1; d >= 0; --d) {
    const int64_t at = d == 0 ? row : divided(row, rows.sizes[d]);
#pragma unroll
    for (int t = 0; t < count; ++t) offset[t] += at * rows.strides[t][d];
  }
}

// A row is the work of blockDim.x threads, either a warp, of which a block has blockDim.y, or a whole block.
constexpr int warp = 32;
constexpr int most_threads = 512;

DEVICE bool alone() { return blockDim.x == warp; }

// Shared memory begins with a few numbers of each warp.
constexpr int64_t exchange_bytes = most_threads / warp * 2 * sizeof(double);

template <class W>
DEVICE W* exchange() {
  return reinterpret_cast<W*>(SHARED_MEMORY);
}
DEVICE unsigned char* stage() { return SHARED_MEMORY + exchange_bytes; }

template <int count, class W>
DEVICE void warp_sum(W (&x)[count]) {
#pragma unroll
  for (int apart = warp / 2; apart > 0; apart /= 2) {
#pragma unroll
    for (int k = 0; k < count; ++k) x[k] += __shfl_xor_sync(0xffffffffu, x[k], apart);
  }
}

// The sums over the threads of a row, which all of them get.
template <int count, class W>
DEVICE void row_sum(W (&x)[count]) {
  warp_sum(x);
  if (alone()) return;
  W* held = exchange<W>();
  const int lane = threadIdx.x % warp, warps = blockDim.x / warp;
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < count; ++k) held[threadIdx.x / warp * count + k] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < count; ++k) x[k] = lane < warps ? held[lane * count + k] : W(0);
  warp_sum(x);
  __syncthreads();  // what was exchanged may be written over
}

// On the host: how kernels are started.

struct Shape {
  int64_t blocks;
  int threads;  // of a row
  int rows;     // of a block at a time
  int64_t shared;

  // As many threads as a row of so many vectors keeps busy.
  static Shape of_rows(int64_t vectors) {
    if (vectors <= 4 * warp) return {0, warp, 4, exchange_bytes};
    return {0, vectors <= 512 ? 128 : vectors <= 2048 ? 256 : most_threads, 1, exchange_bytes};
  }
};

inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows may be moved 16 bytes at a time.
inline bool aligned(const Rows& rows, int64_t size, std::initializer_list<const void*> pointers, int tensors) {
  for (const void* each : pointers) {
    if (reinterpret_cast<uintptr_t>(each) % 16 != 0) return false;
  }
  for (int t = 0; t < tensors; ++t) {
    for (int d = 0; d < rows.dims; ++d) {
      if (rows.strides[t][d] * size % 16 != 0) return false;
    }
  }
  return true;
}

constexpr int64_t most_blocks = (int64_t(1) << 31) - 1;

template <class... Parameters, class... Arguments>
void start([[maybe_unused]] const Device& device, void (*kernel)(Parameters...), Shape shape, const Arguments&... arguments) {
  if (shape.blocks == 0) return;
#if defined(SHARDCOMP_EMULATED)
  emulation::run(shape.blocks, shape.threads, shape.rows, shape.shared, [&] { kernel(arguments...); });
#else
  cudaError_t error = cudaSuccess;
  if (shape.shared > 48 << 10) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared));
  }
  if (error == cudaSuccess) {
    const dim3 blocks(static_cast<unsigned>(shape.blocks)), threads(shape.threads, shape.rows);
    kernel<<<blocks, threads, size_t(shape.shared), static_cast<cudaStream_t>(device.stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string("a CUDA kernel did not start: ") + cudaGetErrorString(error));
#endif
}

// Run `body` with a value of the dtype's type.
template <class F>
void of_dtype(DType dtype, F body) {
  switch (dtype) {
    case DType::bf16: return body(bf16{});
    case DType::fp16: return body(fp16{});
    case DType::fp32: return body(float{});
    case DType::fp64: return body(double{});
  }
}

}  // namespace
}  // namespace shardcomp::cuda
