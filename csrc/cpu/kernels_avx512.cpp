// 512-bit vectors: x86 servers, AMD Zen 4 and later.
#if defined(__x86_64__)
#define TLIN_ISA avx512
#define TLIN_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2"
#define TLIN_LANES 16
#define TLIN_TABLE kKernelsAvx512
#include "kernels_impl.h"
#endif
