// 256-bit vectors with fused multiply-add: x86 from 2013 on.
#if defined(__x86_64__)
#define TLIN_ISA avx2
#define TLIN_TARGET "avx2,fma,f16c,bmi2"
#define TLIN_LANES 8
#define TLIN_TABLE kKernelsAvx2
#include "kernels_impl.h"
#endif
