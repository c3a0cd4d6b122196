// Instructions that the compiler makes of no expression on vectors. GCC gets the built-in functions that <immintrin.h> itself
// calls: that header takes as long to compile as a whole kernel. Other compilers include it.
#pragma once

#if defined(__AVX2__) && (defined(__clang__) || !defined(__GNUC__))
#include <immintrin.h>
#if defined(__AVX512F__)
#define INSTRUCTION_FMAF(a, b, c) _mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#define INSTRUCTION_FMA(a, b, c) _mm512_fmadd_pd((__m512d)(a), (__m512d)(b), (__m512d)(c))
#define INSTRUCTION_SQRTF(x) _mm512_sqrt_ps((__m512)(x))
#define INSTRUCTION_SCALEF(x, q) _mm512_scalef_ps((__m512)(x), (__m512)(q))
#define INSTRUCTION_LENGTHEN(x) _mm512_cvtepu16_epi32((__m256i)(x))
#define INSTRUCTION_SHORTEN(x) _mm512_cvtepi32_epi16((__m512i)(x))
#else
#define INSTRUCTION_FMAF(a, b, c) _mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c))
#define INSTRUCTION_FMA(a, b, c) _mm256_fmadd_pd((__m256d)(a), (__m256d)(b), (__m256d)(c))
#define INSTRUCTION_SQRTF(x) _mm256_sqrt_ps((__m256)(x))
#define INSTRUCTION_LENGTHEN(x) _mm256_cvtepu16_epi32((__m128i)(x))
#endif
#elif defined(__AVX512F__)
typedef short Shorts16 __attribute__((vector_size(32)));
typedef int Ints16 __attribute__((vector_size(64)));
// Mask -1: all lanes. Rounding 4: the current mode, which is to the nearest.
#define INSTRUCTION_FMAF(a, b, c) __builtin_ia32_vfmaddps512_mask((a), (b), (c), -1, 4)
#define INSTRUCTION_FMA(a, b, c) __builtin_ia32_vfmaddpd512_mask((a), (b), (c), -1, 4)
#define INSTRUCTION_SQRTF(x) __builtin_ia32_sqrtps512_mask((x), (x), -1, 4)
#define INSTRUCTION_SCALEF(x, q) __builtin_ia32_scalefps512_mask((x), (q), (x), -1, 4)
#define INSTRUCTION_LENGTHEN(x) __builtin_ia32_pmovzxwd512_mask((Shorts16)(x), Ints16{}, -1)
#define INSTRUCTION_SHORTEN(x) __builtin_ia32_pmovdw512_mask((Ints16)(x), Shorts16{}, -1)
#elif defined(__AVX2__)
typedef short Shorts8 __attribute__((vector_size(16)));
#define INSTRUCTION_FMAF(a, b, c) __builtin_ia32_vfmaddps256((a), (b), (c))
#define INSTRUCTION_FMA(a, b, c) __builtin_ia32_vfmaddpd256((a), (b), (c))
#define INSTRUCTION_SQRTF(x) __builtin_ia32_sqrtps256(x)
#define INSTRUCTION_LENGTHEN(x) __builtin_ia32_pmovzxwd256((Shorts8)(x))
#endif
