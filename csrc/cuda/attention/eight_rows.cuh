// A warp's attention of one query to cached rows in shared memory, eight at a time: four lanes have
// a row, each every fourth four of its elements. For latency: few steps for each of many warps.
#pragma once

#include "decode_rows.cuh"

namespace tlinformer::cuda {

constexpr int kEight = 8;

template <class T, int d>
class EightRows {
  static constexpr int kQuads = d / 4, kOwn = (kQuads + 3) / 4;  // of a row, of a lane

 public:
  struct Query {
    float4 quads[kOwn];
  };
  // Past the L1 cache: a kernel that may still have run when this one began has written it.
  static __device__ Query load(const float* query) {
    Query q;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      q.quads[i] = {0, 0, 0, 0};
      if (quad(i) < kQuads) {
        q.quads[i] = __ldcg(reinterpret_cast<const float4*>(query) + quad(i));
      }
    }
    return q;
  }

  // What follows the first `rows` may be NaN and is not read.
  __device__ void add(const Query& query, const T* keys, const T* values, int rows) {
    const int row = threadIdx.x % 32 / 4;
    const bool exists = row < rows;
    const auto words = [&](const T* from, int i) {
      uint2 w = {0, 0};
      if (exists && quad(i) < kQuads) {
        w = reinterpret_cast<const uint2*>(from + row * d)[quad(i)];
      }
      return w;
    };
    float even = 0, odd = 0;
    uint2 value[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const uint2 key = words(keys, i);
      value[i] = words(values, i);
      const float2 low = unpack<T>(key.x), high = unpack<T>(key.y);
      const float4 q = query.quads[i];
      even += low.x * q.x + high.x * q.z;
      odd += low.y * q.y + high.y * q.w;
    }
    float score = even + odd;
    score += __shfl_xor_sync(0xffffffffu, score, 1);
    score += __shfl_xor_sync(0xffffffffu, score, 2);
    const float higher = exists ? fmaxf(top_, score) : top_;
    const float scale = higher == top_ ? 1.0f : exp2_fast(top_ - higher);
    const float weight = exists ? exp2_fast(score - higher) : 0.0f;
    top_ = higher;
    sum_ = sum_ * scale + weight;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float2 low = unpack<T>(value[i].x), high = unpack<T>(value[i].y);
      mixed_[4 * i] = mixed_[4 * i] * scale + weight * low.x;
      mixed_[4 * i + 1] = mixed_[4 * i + 1] * scale + weight * low.y;
      mixed_[4 * i + 2] = mixed_[4 * i + 2] * scale + weight * high.x;
      mixed_[4 * i + 3] = mixed_[4 * i + 3] * scale + weight * high.y;
    }
  }

  // put(i, x) of the softmax over all added rows: sums of the values (d), greatest score, sum of
  // the weights relative to it.
  template <class Put>
  __device__ void finish(const Put& put) {
    const int lane = threadIdx.x % 32;
    const float most = warp_max(top_);
    const float scale = top_ == kMinusInfinity ? 0.0f : exp2_fast(top_ - most);
    float sum = sum_ * scale;
#pragma unroll
    for (float& x : mixed_) x *= scale;
#pragma unroll
    for (int other = 4; other < 32; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    int first = 0, count = 4 * kOwn;
    sum_scattered<4 * kOwn, 4, 0>(mixed_, lane, first, count);
    constexpr int kKept = ((4 * kOwn + 1) / 2 + 3) / 4;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int at = first + i;
      if (i < count && quad(at / 4) < kQuads) put(4 * quad(at / 4) + at % 4, mixed_[i]);
    }
    if (lane < 2) put(d + lane, lane == 0 ? most : sum);
  }

 private:
  static __device__ int quad(int i) { return threadIdx.x % 4 + 4 * i; }

  float top_ = kMinusInfinity, sum_ = 0, mixed_[4 * kOwn] = {};
};

}  // namespace tlinformer::cuda
