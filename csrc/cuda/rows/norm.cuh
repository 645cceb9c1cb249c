// A row's norm, four neighbouring values at a time: what kernels that normalise rows share.
#pragma once

#include "../numeric.cuh"

namespace tlinformer::cuda {

template <class T>
__device__ inline float4 widened(uint2 words) {
  const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
  return {low.x, low.y, high.x, high.y};
}

__device__ inline float sum_of(float4 v) { return (v.x + v.y) + (v.z + v.w); }

__device__ inline float squares_of(float4 v, float mean) {
  const float a = v.x - mean, b = v.y - mean, c = v.z - mean, d = v.w - mean;
  return (a * a + b * b) + (c * c + d * d);
}

// scale: 1 / the row's deviation.
template <class T>
__device__ inline uint2 normed(float4 v, float mean, float scale, uint2 weight, uint2 bias) {
  const float4 w = widened<T>(weight), b = widened<T>(bias);
  return {pack<T>((v.x - mean) * scale * w.x + b.x, (v.y - mean) * scale * w.y + b.y),
          pack<T>((v.z - mean) * scale * w.z + b.z, (v.w - mean) * scale * w.w + b.w)};
}

}  // namespace tlinformer::cuda
