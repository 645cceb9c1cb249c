// A sequence's state in a kernel of a step. All its blocks want the same few words, which the L2
// cache gives out one request after another: so few warps ask, and each but once.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "state.h"

namespace tlinformer::cuda {

// Past the L1 cache, as an earlier kernel may have run meanwhile on the same multiprocessor. And
// not later: the compiler would put off what is used in the end. Zeros if not `wanted`.
__device__ inline int load_now(const int* from, bool wanted) {
  int value = 0;
  asm volatile(
      "{ .reg .pred wanted; setp.ne.s32 wanted, %2, 0;\n"
      "@wanted ld.global.cg.s32 %0, [%1]; }"
      : "+r"(value)
      : "l"(from), "r"(int{wanted}));
  return value;
}
__device__ inline float2 load_now(const float2* from, bool wanted) {
  float2 value = {0, 0};
  asm volatile(
      "{ .reg .pred wanted; setp.ne.s32 wanted, %3, 0;\n"
      "@wanted ld.global.cg.v2.f32 {%0, %1}, [%2]; }"
      : "+f"(value.x), "+f"(value.y)
      : "l"(from), "r"(int{wanted}));
  return value;
}

// On its way to the lanes of a warp, one of which has the word that all ask for: all must call.
class WarpState {
 public:
  __device__ WarpState(const SequenceState* from, bool wanted)
      : word_(load_now(reinterpret_cast<const int*>(from) + threadIdx.x % 32,
                       wanted && threadIdx.x % 32 < sizeof(SequenceState) / sizeof(int))) {}
  __device__ int live() const { return word(offsetof(SequenceState, live)); }
  // These are below 2^31, as the workspace requires.
  __device__ int last() const { return word(offsetof(SequenceState, last)); }
  __device__ int history() const { return word(offsetof(SequenceState, history)); }

 private:
  __device__ int word(size_t at) const {
    return __shfl_sync(0xffffffffu, word_, static_cast<int>(at / sizeof(int)));
  }

  int word_;
};

}  // namespace tlinformer::cuda
