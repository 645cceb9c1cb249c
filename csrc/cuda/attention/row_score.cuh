// The score of a cached row in shared memory, one row a lane.
#pragma once

#include "../numeric.cuh"

namespace tlinformer::cuda {

// Of row `lane` of dense rows of d, against a query that carries scale and log2(e).
template <class T, int d>
__device__ inline float row_score(const T* rows, const float* query, int lane) {
  constexpr int kQuads = d / 4;
  // Lanes of 16 that would read the same bank begin at different places of their row.
  constexpr int kSame = kQuads % 16 == 0  ? 16
                        : kQuads % 8 == 0 ? 8
                        : kQuads % 4 == 0 ? 4
                        : kQuads % 2 == 0 ? 2
                                          : 1;
  const uint2* row = reinterpret_cast<const uint2*>(rows + lane * d);
  const int begin = lane % 16 * kSame / 16;
  float even = 0, odd = 0;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    int quad = begin + i;
    if (kSame > 1 && quad >= kQuads) quad -= kQuads;
    const uint2 words = row[quad];
    const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
    const float4 q = reinterpret_cast<const float4*>(query)[quad];
    even += low.x * q.x + high.x * q.z;
    odd += low.y * q.y + high.y * q.w;
  }
  return even + odd;
}

}  // namespace tlinformer::cuda
