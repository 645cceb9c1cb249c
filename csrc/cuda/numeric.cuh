// Arithmetic on the two storage types, bfloat16 and float16, which kernels take as T.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "tlinformer/config.h"
#include "tlinformer/error.h"

namespace tlinformer::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>{}) for the storage type of `dtype`.
template <class F>
void with_type(DType dtype, const F& f) {
  require(dtype != DType::float32, "the CUDA backend computes in bfloat16 and float16");
  if (dtype == DType::bfloat16) return f(TypeTag<bf16>{});
  f(TypeTag<f16>{});
}

// The head sizes that kernels are compiled for.
#define TLINFORMER_HEAD_SIZES(X) X(32) X(36) X(40) X(48) X(64) X(80) X(96) X(128)

__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}

// Two values in a word, the first in its low half.
template <class T>
__device__ inline float2 unpack(uint32_t word);
template <>
__device__ inline float2 unpack<bf16>(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
template <>
__device__ inline float2 unpack<f16>(uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

template <class T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pack<f16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// C (16 x 8, float32) += A (16 x 16, row) B (16 x 8, column), fragments as in PTX's mma.m16n8k16.
template <class T>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

// Of several values at once, so that their exchanges do not wait for one another.
template <int kCount>
__device__ inline void warp_sums(float (&x)[kCount]) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], lane);
  }
}

// Sums values[0 ... kCount) over the lanes that differ in the bits kDistance, 2 kDistance, ... 16
// other than those in kSkip. Of the sums each lane keeps `count`, which are number first, first + 1
// ... of all.
template <int kCount, int kDistance, int kSkip, int N>
__device__ inline void sum_scattered(float (&values)[N], int lane, int& first, int& count) {
  if constexpr (kDistance >= 32) {
    return;
  } else if constexpr ((kSkip & kDistance) != 0) {
    sum_scattered<kCount, 2 * kDistance, kSkip>(values, lane, first, count);
  } else {
    constexpr int kHalf = (kCount + 1) / 2;
    const bool upper = lane & kDistance;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float low = values[i], high = i + kHalf < kCount ? values[i + kHalf] : 0.0f;
      values[i] =
          (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kDistance);
    }
    first += upper ? kHalf : 0;
    count = upper ? count - kHalf : min(count, kHalf);
    sum_scattered<kHalf, 2 * kDistance, kSkip>(values, lane, first, count);
  }
}

// The order of floats, negative ones turned around, is that of their bits; for these there is one
// instruction.
__device__ inline float warp_max(float x) {
  const auto turn = [](int bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  return __int_as_float(turn(__reduce_max_sync(0xffffffffu, turn(__float_as_int(x)))));
}

}  // namespace tlinformer::cuda
