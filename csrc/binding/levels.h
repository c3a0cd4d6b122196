// The CPU's kernels for the best instruction set of this processor, or those of the one level that was compiled.
//
// A library that was built ahead of time has three levels and runs on any x86-64 processor; one that was built just in time has
// its own processor's level. All levels give the same bits. The choice is an explicit table, not GCC's target_clones, which
// clang and other systems lack and which does not carry over to inlined helpers.
#pragma once

#include "../cpu/kernels.h"

namespace shardcomp::cpu {

#if defined(SHARDCOMP_ONE_LEVEL)
#define SHARDCOMP_CHOOSE(name, Arguments) \
  inline void name(const Arguments& a, int64_t begin, int64_t end) { SHARDCOMP_ONE_LEVEL::name(a, begin, end); }
#else
// An index into base, v3 (AVX2) and v4 (AVX-512).
inline int best_level() {
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v3 && v4 ? 2 : v3 ? 1 : 0;
}

#define SHARDCOMP_CHOOSE(name, Arguments)                                               \
  inline void name(const Arguments& a, int64_t begin, int64_t end) {                    \
    static constexpr decltype(&base::name) levels[] = {base::name, v3::name, v4::name}; \
    static const int level = best_level();                                              \
    levels[level](a, begin, end);                                                       \
  }
#endif
SHARDCOMP_CPU_KERNELS(SHARDCOMP_CHOOSE)
#undef SHARDCOMP_CHOOSE

}  // namespace shardcomp::cpu
