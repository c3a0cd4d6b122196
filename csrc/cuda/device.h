// The building blocks of every CUDA kernel: conversions between the four dtypes and the dtype of computation, loads and stores
// of 16 bytes, offsets of rows, sums over threads, and the launch.
//
// Every kernel here is bound by memory bandwidth: a few operations for each element. So the rules are the same everywhere. Each
// element moves once in each direction, in the widest access that a thread has (16 bytes), with several accesses in flight.
// Sums are in float32 or wider and in a fixed order, without atomics, so that a call gives the same bits every time.
//
// Numerics: nvcc runs with --fmad=false, so that a * b + c rounds twice as it does in the reference. Where one rounding is
// right, the code says so with `fused`.
//
// The language is plain C++ with a few CUDA words, to which csrc/emulation gives a meaning on the host: the tests run these
// same sources without a GPU. PTX stays behind __CUDA_ARCH__, each time beside the same arithmetic in C++.
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
// Unnamed: each source has its own copy, so that the linker never merges functions of two sources that have one name.
namespace {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The dtype of computation: float32 for everything but float64.
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

// The elements in 16 bytes, the widest load or store of one thread. Narrower accesses need more instructions for the same bytes
// and do not reach the memory bandwidth.
template <class T>
constexpr int lanes = 16 / sizeof(T);

DEVICE float widen(float x) { return x; }
DEVICE double widen(double x) { return x; }
// A bf16 is the upper half of a float.
DEVICE float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DEVICE float widen(fp16 x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  // The exponents of fp16 are biased by 15, those of float by 127: a product with 2^112 corrects it, exactly, subnormals too.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t infinite = magnitude >= 0x0f800000u ? 0x7f800000u : 0;
  const uint32_t unbiased = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
  return __uint_as_float(unbiased | infinite | ((x.bits & 0x8000u) << 16));
#endif
}

// Rounding to the nearest, ties to even, as torch rounds.
template <class T>
struct Narrow {
  static __device__ __forceinline__ T of(Wide<T> x) { return x; }
};
template <>
struct Narrow<bf16> {
  static __device__ __forceinline__ bf16 of(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
#else
    // Adding just under half a unit in the last place, and one more where the kept bits are odd, carries where it must.
    const uint32_t bits = __float_as_uint(x);
    return {uint16_t(x != x ? 0x7fc0u : (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16)};
#endif
  }
};
template <>
struct Narrow<fp16> {
  static __device__ __forceinline__ fp16 of(float x) {
#if defined(__CUDA_ARCH__)
    fp16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
#else
    const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
    uint32_t result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    if (magnitude < 0x38800000u) result = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    if (magnitude >= 0x47800000u) result = 0x7c00u;
    if (magnitude > 0x7f800000u) result = 0x7e00u;
    return {uint16_t(result | ((bits >> 16) & 0x8000u))};
#endif
  }
};

// The value of `x` after a round trip through T: where a model in 16 bits rounds between two operations, so does a fused
// kernel.
template <class T>
DEVICE Wide<T> rounded(Wide<T> x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  constexpr bool as_upper = std::is_same_v<T, bf16>;
#else
  constexpr bool as_upper = false;
#endif
  if constexpr (as_upper) {
    // A conversion of two numbers, the lower one zero, leaves x in the upper half, where it already is a float. The conversion
    // of a single number goes through a unit with a quarter of the throughput.
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(x), "f"(0.0f));
    return __uint_as_float(result);
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

// 1 / √x, the scale of a row of T. rsqrtf may be wrong in its last two bits, an error that the whole row shares. For 16-bit
// rows it is what a model calls too, and T is coarser. For float32 one Newton step follows, from the remainder 1 - x · rsqrt²
// in extra precision. The step is skipped where it gives NaN (x is 0 or infinite).
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

// The word that a pack of so many bytes moves in: 16 bytes, or 8 for 16-bit elements beside float32 ones.
template <int bytes>
struct Moved {
  typedef uint4 type;
};
template <>
struct Moved<8> {
  typedef uint2 type;
};

// n adjacent elements.
template <class T, int n>
struct Pack {
  static constexpr int bytes = sizeof(T) * n;
  typedef typename Moved<bytes>::type Word;
  static constexpr int count = bytes / sizeof(Word);
  static_assert(bytes % sizeof(Word) == 0, "a pack is of whole words");
  T elements[n];
};

// The values of a pack, and back. 16-bit elements are taken two at a time as one 32-bit word: half-word accesses would cost a
// shift and a mask each.
template <class T, int n, class W>
DEVICE void widen(W (&values)[n], const Pack<T, n>& pack) {
  if constexpr (std::is_same_v<T, bf16> && n % 2 == 0) {
    uint32_t pairs[n / 2];
    memcpy(pairs, &pack, sizeof(pairs));
#pragma unroll
    for (int j = 0; j < n; ++j) values[j] = __uint_as_float(j % 2 == 0 ? pairs[j / 2] << 16 : pairs[j / 2] & 0xffff0000u);
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) values[j] = widen(pack.elements[j]);
  }
}
template <class T, int n, class W>
DEVICE void narrow(Pack<T, n>& pack, const W (&values)[n]) {
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
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pairs[j / 2]) : "f"(values[j + 1]), "f"(values[j]));
      } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pairs[j / 2]) : "f"(values[j + 1]), "f"(values[j]));
      }
    }
    memcpy(&pack, pairs, sizeof(pairs));
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) pack.elements[j] = Narrow<T>::of(values[j]);
  }
}

// The first `left` of the n elements at `p`, then zeros, which change no sum. vectorized: `p` is aligned to a word. The tail of
// a row and unaligned rows take the second branch, one element at a time.
template <int n, class T, class W>
DEVICE void load(W (&values)[n], const T* p, int64_t left, bool vectorized) {
  typedef Pack<T, n> P;
  P pack;
  if (vectorized && left >= n) {
    typename P::Word words[P::count];
#pragma unroll
    for (int k = 0; k < P::count; ++k) words[k] = reinterpret_cast<const typename P::Word*>(p)[k];
    memcpy(&pack, words, sizeof(pack));
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) pack.elements[j] = j < left ? p[j] : T{};
  }
  widen(values, pack);
}

// Stores one word to global memory. It is PTX because nvcc merges a C++ store with the element-wise stores of the unaligned
// branch, and then stores element by element in both (tests/kernels/test_cuda_build.py counts the 16-byte stores).
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

// 16 bytes, and their values, in two steps: a thread issues several loads before it uses the first, which hides the latency of
// memory (hundreds of cycles) without more threads.
DEVICE uint4 fetched(const void* p) { return *static_cast<const uint4*>(ALIGNED(p, 16)); }
template <class T, class W>
DEVICE void unpack(W (&values)[lanes<T>], uint4 word) {
  Pack<T, lanes<T>> pack;
  memcpy(&pack, &word, sizeof(pack));
  widen(values, pack);
}

// Stores n elements to shared memory, or to memory that may be either kind: not `vectorized`, the first `left` one by one.
template <int n, class T, class W>
DEVICE void keep(T* p, const W (&values)[n], int64_t left = n, bool vectorized = true) {
  typedef Pack<T, n> P;
  P pack;
  narrow(pack, values);
  if (vectorized && left >= n) {
    typename P::Word words[P::count];
    memcpy(words, &pack, sizeof(pack));
#pragma unroll
    for (int k = 0; k < P::count; ++k) reinterpret_cast<typename P::Word*>(p)[k] = words[k];
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (j < left) p[j] = pack.elements[j];
    }
  }
}

// Stores the first `left` of n elements to global memory.
template <int n, class T, class W>
DEVICE void store(T* p, const W (&values)[n], int64_t left, bool vectorized) {
  typedef Pack<T, n> P;
  if (!vectorized || left < n) return keep(p, values, left, false);
  P pack;
  narrow(pack, values);
  typename P::Word words[P::count];
  memcpy(words, &pack, sizeof(pack));
#pragma unroll
  for (int k = 0; k < P::count; ++k) write(reinterpret_cast<typename P::Word*>(p) + k, words[k]);
}

// n values of a factor from column `at` on. An offset is added in the dtype of computation; with `rounded` the sum is then
// rounded to T, as 1 + weight is in a model whose weight is a T.
template <class T, int n>
DEVICE void load_factor(Wide<T> (&values)[n], const Factor& factor, int64_t at, int64_t left, bool vectorized) {
  typedef Wide<T> W;
  if (factor.narrow) {
    load(values, static_cast<const T*>(factor.values) + at, left, vectorized);
  } else {
    load(values, static_cast<const W*>(factor.values) + at, left, vectorized);
  }
  if (factor.offset != 0) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      values[j] += W(factor.offset);
      if (factor.narrow && factor.rounded) values[j] = rounded<T>(values[j]);
    }
  }
}

// Divides `at` by `size` in place and returns the remainder. A GPU has no integer division: for 64 bits it is a long
// subroutine, for 32 bits a fraction of that, so the short one runs whenever both fit.
DEVICE int64_t divided(int64_t& at, int64_t size) {
  const int64_t dividend = at;
  if (((dividend | size) >> 31) == 0) {
    at = uint32_t(dividend) / uint32_t(size);
  } else {
    at = dividend / size;
  }
  return dividend - at * size;
}

// The offset of a row in each of `count` tensors, from its index over all leading dimensions. The loop over dimensions stays
// rolled: there are one or two of them, and unrolled copies of a division would cost registers.
template <int count>
DEVICE void row_offsets(int64_t (&offset)[count], const Rows& rows, int64_t row) {
#pragma unroll
  for (int t = 0; t < count; ++t) offset[t] = 0;
#pragma unroll 1
  for (int d = rows.dims - 1; d >= 0; --d) {
    const int64_t at = d == 0 ? row : divided(row, rows.sizes[d]);
#pragma unroll
    for (int t = 0; t < count; ++t) offset[t] += at * rows.strides[t][d];
  }
}

// A row is the work of blockDim.x threads: one warp (blockDim.y of them in a block, each with a row of its own), or a whole
// block. 512 threads at most leave each thread 128 of a multiprocessor's 64k registers.
constexpr int warp = 32;
constexpr int most_threads = 512;

DEVICE bool alone() { return blockDim.x == warp; }

// Shared memory begins with two numbers for each warp, through which warps exchange their sums; `stage` is the rest.
constexpr int64_t exchange_bytes = most_threads / warp * 2 * sizeof(double);

template <class W>
DEVICE W* exchange() {
  return reinterpret_cast<W*>(SHARED_MEMORY);
}
DEVICE unsigned char* stage() { return SHARED_MEMORY + exchange_bytes; }

// Sums over a warp. In this butterfly every lane adds the same pairs, so all lanes get the same bits.
template <int count, class W>
DEVICE void warp_sum(W (&x)[count]) {
#pragma unroll
  for (int distance = warp / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < count; ++k) x[k] += __shfl_xor_sync(0xffffffffu, x[k], distance);
  }
}

// The sums over the threads of a row; all of them get the result. Each warp reduces what the warps left, in the same order, so
// that one barrier serves both the sum and its broadcast.
template <int count, class W>
DEVICE void row_sum(W (&x)[count]) {
  warp_sum(x);
  if (alone()) return;
  W* slots = exchange<W>();
  const int lane = threadIdx.x % warp, warps = blockDim.x / warp;
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < count; ++k) slots[threadIdx.x / warp * count + k] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < count; ++k) x[k] = lane < warps ? slots[lane * count + k] : W(0);
  warp_sum(x);
  __syncthreads();  // all have read: the next sum may overwrite the exchange
}

// On the host: the launch of kernels.

struct Shape {
  int64_t blocks;
  int threads;  // for each row
  int rows;     // that a block takes at a time
  int64_t shared;

  // As many threads as a row of so many vectors keeps busy: 4 to 8 vectors for each. A short row is left to one warp,
  // which needs no barrier.
  static Shape of_rows(int64_t vectors) {
    if (vectors <= 4 * warp) return {0, warp, 4, exchange_bytes};
    return {0, vectors <= 512 ? 128 : vectors <= 2048 ? 256 : most_threads, 1, exchange_bytes};
  }
};

inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether every row of these tensors begins at a multiple of 16 bytes.
inline bool aligned(const Rows& rows, int64_t size, std::initializer_list<const void*> pointers, int tensors) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  }
  for (int t = 0; t < tensors; ++t) {
    for (int d = 0; d < rows.dims; ++d) {
      if (rows.strides[t][d] * size % 16 != 0) return false;
    }
  }
  return true;
}

// The limit of a grid's first dimension.
constexpr int64_t most_blocks = (int64_t(1) << 31) - 1;

template <class... Parameters, class... Arguments>
void start([[maybe_unused]] const Device& device, void (*kernel)(Parameters...), Shape shape, const Arguments&... arguments) {
  if (shape.blocks == 0) return;
#if defined(SHARDCOMP_EMULATED)
  emulation::run(shape.blocks, shape.threads, shape.rows, shape.shared, [&] { kernel(arguments...); });
#else
  cudaError_t error = cudaSuccess;
  // More than 48 KiB of dynamic shared memory must be requested for each kernel.
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

// Calls `body` with a value of the dtype's type.
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
