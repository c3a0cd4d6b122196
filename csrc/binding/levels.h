// The kernels of the CPU for the best instruction set that this processor has, or those of the one level that was compiled.
#pragma once

#include "../cpu/kernels.h"

namespace shardcomp::cpu {

#if defined(SHARDCOMP_ONE_LEVEL)
#define SHARDCOMP_CHOOSE(name, Arguments) \
  inline void name(const Arguments& a, int64_t begin, int64_t end) { SHARDCOMP_ONE_LEVEL::name(a, begin, end); }
#else
// An index into base, v3 and v4.
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
