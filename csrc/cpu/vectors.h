// SIMD vectors, the conversions of the four dtypes to and from them, and loops over rows. Arithmetic is in float, or in double
// for fp64.
//
// The vectors are GCC's and clang's vector types, not loops left to the vectorizer: which additions happen, and in which order,
// is then part of the source, and so are the bits. The build turns contraction off (-ffp-contract=off): a * b + c rounds twice
// unless the code calls `fma`.
//
// Every source is compiled once for each instruction set (level), into the level's namespace, and everything is inlined.
// Without that, the linker could keep the AVX-512 copy of a shared function and crash an older processor with it.
#pragma once

#include <cstdint>
#include <cstring>

#include "instructions.h"
#include "kernels.h"

#if defined(__AVX512F__)
#define SHARDCOMP_BYTES 64
#else
#define SHARDCOMP_BYTES 32
#endif

#define INLINE static inline __attribute__((always_inline))
// A function that the compiler splits into long code where the level has no vectors of this size (base). There it is a call,
// since inlining it at every use makes the compilation several times as long.
#if defined(__x86_64__) && !defined(__AVX2__)
#define LONG static __attribute__((noinline, unused))
#else
#define LONG INLINE
#endif
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
  static constexpr int count = SHARDCOMP_BYTES / 4;
  typedef float Vector __attribute__((vector_size(SHARDCOMP_BYTES)));
};
template <>
struct Lanes<double> {
  static constexpr int count = SHARDCOMP_BYTES / 8;
  typedef double Vector __attribute__((vector_size(SHARDCOMP_BYTES)));
};
template <class W>
using Vec = typename Lanes<W>::Vector;
typedef Vec<float> Floats;
typedef uint32_t Bits __attribute__((vector_size(SHARDCOMP_BYTES)));
typedef int32_t Ints __attribute__((vector_size(SHARDCOMP_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(SHARDCOMP_BYTES / 2)));

// The dtype of computation: float for everything but double.
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

// `yes` where the mask of a comparison is set, else `no`.
template <class V>
INLINE V pick(Ints mask, V yes, V no) {
  return mask ? yes : no;
}

INLINE Bits lengthened(Halves bits) {
#if defined(__AVX2__)
  return (Bits)INSTRUCTION_LENGTHEN(bits);
#else
  return __builtin_convertvector(bits, Bits);
#endif
}
INLINE Halves shortened(Bits bits) {
#if defined(__AVX512F__)
  return (Halves)INSTRUCTION_SHORTEN(bits);
#else
  return __builtin_convertvector(bits, Halves);
#endif
}

// bf16 is the upper half of a float. Rounding is torch's: to the nearest, ties to even, every NaN becomes 0x7fc0.
INLINE Floats widen(Halves bits, bf16) { return as_floats(lengthened(bits) << 16); }

// Rounds to bf16 in the upper halves and leaves anything in the lower ones. Adding just under half a unit, and one more for odd
// bits, carries where it must; a NaN with all low bits set would carry into the sign, hence `narrow` treats NaN apart.
INLINE Bits rounded(Floats x) {
  const Bits bits = as_bits(x);
  return bits + (((bits >> 16) & 1u) + 0x7fffu);
}
LONG Halves narrow(Floats x, bf16) { return shortened(pick(x != x, Bits{} + 0x7fc00000u, rounded(x)) >> 16); }

// fp16: exponents are biased by 15, those of float by 127. A product with 2^112 corrects that, exactly, subnormals too. AVX2
// has an instruction for it (F16C), but the base level does not, and all levels give the same bits.
LONG Floats widen(Halves bits, fp16) {
  Bits wide = lengthened(bits);
  Bits magnitude = (wide & 0x7fffu) << 13;
  Bits unbiased = as_bits(as_floats(magnitude) * 0x1p112f);
  Bits infinite = pick(magnitude >= (Bits{} + 0x0f800000u), Bits{} + 0x7f800000u, Bits{});
  return as_floats(unbiased | infinite | ((wide & 0x8000u) << 16));
}

// Normal results round as bf16 does, but 13 bits away. For subnormal ones, adding 0.5 puts the last bit of the float where the
// last bit of fp16 is, so that the processor's own addition rounds. From 2^16 on the result is infinite, and so are normal ones
// that carry.
LONG Halves narrow(Floats x, fp16) {
  Bits bits = as_bits(x);
  Bits sign = (bits >> 16) & 0x8000u;
  Bits magnitude = bits & 0x7fffffffu;
  Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  Bits subnormal = as_bits(as_floats(magnitude) + 0.5f) - 0x3f000000u;
  Bits result = pick(magnitude < (Bits{} + 0x38800000u), subnormal, normal);
  result = pick(magnitude >= (Bits{} + 0x47800000u), Bits{} + 0x7c00u, result);
  result = pick(magnitude > (Bits{} + 0x7f800000u), Bits{} + 0x7e00u, result);
  return shortened(result | sign);
}

// The first n elements at `p`, then zeros. memcpy makes no assumption about alignment, and compiles to one unaligned load.
template <class T>
INLINE Floats load(const T* p, int n) {
  Halves bits{};
  if (n == Lanes<float>::count) {
    memcpy(&bits, p, sizeof(bits));
  } else {
    memcpy(&bits, p, 2 * n);
  }
  return widen(bits, T{});
}
template <class W>
INLINE Vec<W> load_wide(const W* p, int n) {
  Vec<W> x{};
  if (n == Lanes<W>::count) {
    memcpy(&x, p, sizeof(x));
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
  if (n == Lanes<float>::count) {
    memcpy(p, &bits, sizeof(bits));
  } else {
    memcpy(p, &bits, 2 * n);
  }
}
template <class W>
INLINE void store_wide(W* p, Vec<W> x, int n) {
  if (n == Lanes<W>::count) {
    memcpy(p, &x, sizeof(x));
  } else {
    memcpy(p, &x, sizeof(W) * n);
  }
}
INLINE void store(float* p, Floats x, int n) { store_wide<float>(p, x, n); }
INLINE void store(double* p, Vec<double> x, int n) { store_wide<double>(p, x, n); }

// The value of `x` after a round trip through T. For bf16 without the case of NaN: here `x` comes from bf16 values alone, whose
// NaN has an empty lower half.
template <class T>
struct Round {
  static INLINED inline Floats to(Floats x) { return widen(narrow(x, T{}), T{}); }
};
template <>
struct Round<bf16> {
  static INLINED inline Floats to(Floats x) { return as_floats(rounded(x) & 0xffff0000u); }
};
template <>
struct Round<float> {
  static INLINED inline Floats to(Floats x) { return x; }
};
template <>
struct Round<double> {
  static INLINED inline Vec<double> to(Vec<double> x) { return x; }
};

// a · b + c, rounded once, at every level: without the instruction the C library computes it, slowly but with the same bits.
LONG Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX2__)
  return (Floats)INSTRUCTION_FMAF(a, b, c);
#else
  for (int i = 0; i < Lanes<float>::count; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

LONG Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX2__)
  return (Vec<double>)INSTRUCTION_FMA(a, b, c);
#else
  for (int i = 0; i < Lanes<double>::count; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
#endif
}

LONG Floats square_root(Floats x) {
#if defined(__AVX2__)
  return (Floats)INSTRUCTION_SQRTF(x);
#else
  for (int i = 0; i < Lanes<float>::count; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
LONG Vec<double> square_root(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

// Calls f(at, n) for the elements [at, at + n) of each vector in [0, size). The last one may have fewer than a vector's lanes.
template <class W, class F>
INLINE void for_vectors(int64_t size, F f) {
  constexpr int lanes = Lanes<W>::count;
#if defined(__x86_64__) && !defined(__AVX2__)
  // One body for full and partial vectors: a second one would double a long compilation for the slowest level.
  for (int64_t at = 0; at < size; at += lanes) f(at, int(size - at < lanes ? size - at : lanes));
#else
  int64_t at = 0;
  for (; at + lanes <= size; at += lanes) f(at, lanes);
  if (at < size) f(at, int(size - at));
#endif
}

// Calls `body` with a value of the dtype's type.
template <class F>
INLINE void of_dtype(DType dtype, F body) {
  switch (dtype) {
    case DType::bf16: return body(bf16{});
    case DType::fp16: return body(fp16{});
    case DType::fp32: return body(float{});
    case DType::fp64: return body(double{});
  }
}

// A compile-time value as an argument.
template <class Kind, Kind constant>
struct Constant {
  static constexpr Kind value = constant;
};

// Visits rows in order and keeps the offset of each in every tensor. A step is additions alone, like an odometer; only the
// first row needs divisions.
struct Cursor {
  const Rows& rows;
  int64_t at[most_dims];
  int64_t offset[most_tensors];

  INLINED explicit Cursor(const Rows& all_rows, int64_t row) : rows(all_rows) {
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

// Calls f(offsets, size) for each run of adjacent elements in [begin, end), which counts elements over all rows: a thread's
// share of elementwise work may begin and end within a row.
template <class F>
INLINE void row_segments(const Rows& rows, int64_t begin, int64_t end, F f) {
  if (begin >= end) return;
  Cursor cursor(rows, begin / rows.width);
  int64_t column = begin % rows.width;
  for (int64_t at = begin; at < end; cursor.next()) {
    const int64_t rest = rows.width - column, size = rest < end - at ? rest : end - at;
    int64_t offset[most_tensors];
    for (int t = 0; t < most_tensors; ++t) offset[t] = cursor.offset[t] + column;
    f(offset, size);
    at += size;
    column = 0;
  }
}

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
