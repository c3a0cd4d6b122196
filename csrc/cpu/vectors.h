// Vectors of 32 bytes, and the four dtypes to and from them. All is computed in float, or in double for fp64.
//
// Everything lies in the level's namespace and is inlined, so that no function that was compiled for one instruction set is
// ever called from code for another.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__FMA__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class W>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int count = 8;
  typedef float Vector __attribute__((vector_size(32)));
  typedef uint32_t Bits __attribute__((vector_size(32)));
};
template <>
struct Lanes<double> {
  static constexpr int count = 4;
  typedef double Vector __attribute__((vector_size(32)));
  typedef uint64_t Bits __attribute__((vector_size(32)));
};
template <class W>
using Vec = typename Lanes<W>::Vector;
typedef Vec<float> Floats;
typedef Lanes<float>::Bits Bits;
typedef uint16_t Halves __attribute__((vector_size(16)));

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

INLINE Floats as_floats(Bits bits) { return (Floats)bits; }
INLINE Bits as_bits(Floats x) { return (Bits)x; }

// `yes` where the mask's lanes are all ones, `no` where they are zero.
INLINE Bits pick(Bits mask, Bits yes, Bits no) { return (mask & yes) | (~mask & no); }
INLINE Floats pick(Bits mask, Floats yes, Floats no) { return as_floats(pick(mask, as_bits(yes), as_bits(no))); }

// bf16, as torch rounds to it: to nearest, ties to even, one NaN.
INLINE Floats widen(Halves bits, bf16) { return as_floats(__builtin_convertvector(bits, Bits) << 16); }

INLINE Halves narrow(Floats x, bf16) {
  Bits bits = as_bits(x);
  Bits rounded = (bits + (((bits >> 16) & 1u) + 0x7fffu)) >> 16;
  return __builtin_convertvector(pick((Bits)(x != x), Bits{} + 0x7fc0u, rounded), Halves);
}

// fp16: its exponents are put right by one product, which is exact, subnormal ones as well.
INLINE Floats widen(Halves bits, fp16) {
  Bits wide = __builtin_convertvector(bits, Bits);
  Bits magnitude = (wide & 0x7fffu) << 13;
  Bits unbiased = as_bits(as_floats(magnitude) * 0x1p112f);
  Bits infinite = (Bits)(magnitude >= (Bits{} + 0x0f800000u)) & 0x7f800000u;
  return as_floats(unbiased | infinite | ((wide & 0x8000u) << 16));
}

INLINE Halves narrow(Floats x, fp16) {
  Bits bits = as_bits(x);
  Bits sign = (bits >> 16) & 0x8000u;
  Bits magnitude = bits & 0x7fffffffu;
  Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  Bits subnormal = as_bits(as_floats(magnitude) + 0.5f) - 0x3f000000u;
  Bits made = pick((Bits)(magnitude < (Bits{} + 0x38800000u)), subnormal, normal);
  made = pick((Bits)(magnitude >= (Bits{} + 0x47800000u)), Bits{} + 0x7c00u, made);
  made = pick((Bits)(magnitude > (Bits{} + 0x7f800000u)), Bits{} + 0x7e00u, made);
  return __builtin_convertvector(made | sign, Halves);
}

// The first n elements at `p`, zeros behind them.
template <class T>
INLINE Floats load(const T* p, int n) {
  Halves bits{};
  if (n == 8) {
    memcpy(&bits, p, 16);
  } else {
    memcpy(&bits, p, 2 * n);
  }
  return widen(bits, T{});
}
template <class W>
INLINE Vec<W> load_wide(const W* p, int n) {
  Vec<W> x{};
  if (n == Lanes<W>::count) {
    memcpy(&x, p, 32);
  } else {
    memcpy(&x, p, sizeof(W) * n);
  }
  return x;
}
INLINE Floats load(const float* p, int n) { return load_wide<float>(p, n); }
INLINE Vec<double> load(const double* p, int n) { return load_wide<double>(p, n); }

template <class T>
INLINE void store(T* p, Floats x, int n) {
  Halves bits = narrow(x, T{});
  if (n == 8) {
    memcpy(p, &bits, 16);
  } else {
    memcpy(p, &bits, 2 * n);
  }
}
template <class W>
INLINE void store_wide(W* p, Vec<W> x, int n) {
  if (n == Lanes<W>::count) {
    memcpy(p, &x, 32);
  } else {
    memcpy(p, &x, sizeof(W) * n);
  }
}
INLINE void store(float* p, Floats x, int n) { store_wide<float>(p, x, n); }
INLINE void store(double* p, Vec<double> x, int n) { store_wide<double>(p, x, n); }

// As a T holds it.
template <class T>
struct Round {
  static INLINED inline Floats to(Floats x) { return widen(narrow(x, T{}), T{}); }
};
template <>
struct Round<float> {
  static INLINED inline Floats to(Floats x) { return x; }
};
template <>
struct Round<double> {
  static INLINED inline Vec<double> to(Vec<double> x) { return x; }
};

// a · b + c, rounded once.
INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < 8; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

// f(at, n) for the elements [at, at + n) of each vector in [0, size).
template <class W, class F>
INLINE void each(int64_t size, F f) {
  constexpr int lanes = Lanes<W>::count;
  int64_t at = 0;
  for (; at + lanes <= size; at += lanes) f(at, lanes);
  if (at < size) f(at, int(size - at));
}

// Run `body` with a value of the dtype's type.
template <class F>
INLINE void of_dtype(DType dtype, F body) {
  switch (dtype) {
    case DType::bf16: return body(bf16{});
    case DType::fp16: return body(fp16{});
    case DType::fp32: return body(float{});
    case DType::fp64: return body(double{});
  }
}

// A value that the compiler knows.
template <class Kind, Kind held>
struct Constant {
  static constexpr Kind value = held;
};

// Goes through rows in order, with the place of each in every tensor.
struct Cursor {
  const Rows& rows;
  int64_t at[most_dims];
  int64_t offset[most_tensors];

  INLINED explicit Cursor(const Rows& given, int64_t row) : rows(given) {
    for (int t = 0; t < most_tensors; ++t) offset[t] = 0;
    for (int d = rows.dims - 1; d >= 0; --d) {
      at[d] = row % rows.sizes[d];
      row /= rows.sizes[d];
      for (int t = 0; t < most_tensors; ++t) offset[t] += at[d] * rows.strides[t][d];
    }
  }
  INLINED void next() {
    for (int d = rows.dims - 1; d >= 0; --d) {
      for (int t = 0; t < most_tensors; ++t) offset[t] += rows.strides[t][d];
      if (++at[d] < rows.sizes[d]) return;
      for (int t = 0; t < most_tensors; ++t) offset[t] -= rows.sizes[d] * rows.strides[t][d];
      at[d] = 0;
    }
  }
};

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
