// 128-bit vectors, which every 64-bit machine has; and the choice between the sets.
#define TLIN_ISA baseline
#define TLIN_LANES 4
#define TLIN_TABLE kKernelsBaseline
#include "kernels_impl.h"

namespace tlinformer::cpu {

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& best = []() -> const Kernels& {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return kKernelsAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kKernelsAvx2;
    return kKernelsBaseline;
  }();
  return best;
#else
  return kKernelsBaseline;
#endif
}

}  // namespace tlinformer::cpu
