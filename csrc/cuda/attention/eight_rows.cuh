// A warp's attention of one query to cached rows in shared memory, eight at a time. For latency:
// few instructions, and none to bring lanes' sums together at the end.
#pragma once

#include "decode_rows.cuh"

namespace tlinformer::cuda {

constexpr int kEight = 8;

// Scores: four lanes have a row, each every fourth four of its elements. Values: each of the first
// kValueLanes lanes has kOwnValues elements of all eight rows.
template <class T, int d>
class EightRows {
  static constexpr int kQuads = d / 4, kOwn = (kQuads + 3) / 4;  // of a row, of a lane

 public:
  static constexpr int kOwnValues = d <= 64 ? 2 : 4, kValueLanes = d / kOwnValues;

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

  // What follows the first `rows`, at least one, may be NaN and is not read.
  __device__ void add(const Query& query, const T* keys, const T* values, int rows) {
    const int lane = threadIdx.x % 32, row = lane / 4;
    uint32_t value[kEight][kOwnValues / 2];
#pragma unroll
    for (int r = 0; r < kEight; ++r) {
      // The last row again does no harm with a weight of zero.
      const T* const from = values + min(r, rows - 1) * d + kOwnValues * lane;
#pragma unroll
      for (int i = 0; i < kOwnValues / 2; ++i) {
        value[r][i] = 0;
        if (lane < kValueLanes) value[r][i] = reinterpret_cast<const uint32_t*>(from)[i];
      }
    }
    const T* const key = keys + min(row, rows - 1) * d;
    float even = 0, odd = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      uint2 words = {0, 0};
      if (quad(i) < kQuads) words = reinterpret_cast<const uint2*>(key)[quad(i)];
      const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
      const float4 q = query.quads[i];
      even += low.x * q.x + high.x * q.z;
      odd += low.y * q.y + high.y * q.w;
    }
    float score = even + odd;
    score += __shfl_xor_sync(0xffffffffu, score, 1);
    score += __shfl_xor_sync(0xffffffffu, score, 2);
    if (row >= rows) score = kMinusInfinity;
    float higher = fmaxf(top_, score);  // of a row's four lanes the same
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      higher = fmaxf(higher, __shfl_xor_sync(0xffffffffu, higher, lanes));
    }
    const float scale = exp2_fast(top_ - higher), own = exp2_fast(score - higher);
    top_ = higher;
    sum_ *= scale;
#pragma unroll
    for (float& x : mixed_) x *= scale;
#pragma unroll
    for (int r = 0; r < kEight; ++r) {
      const float weight = __shfl_sync(0xffffffffu, own, 4 * r);
      sum_ += weight;
#pragma unroll
      for (int i = 0; i < kOwnValues / 2; ++i) {
        const float2 v = unpack<T>(value[r][i]);
        mixed_[2 * i] += weight * v.x;
        mixed_[2 * i + 1] += weight * v.y;
      }
    }
  }

  // Of the softmax over all added rows: put(i, pair) of the sums of the values, pairs of (d), and
  // behind them of the greatest score with the sum of the weights relative to it.
  template <class Put>
  __device__ void finish(const Put& put) const {
    const int lane = threadIdx.x % 32;
    if (lane < kValueLanes) {
#pragma unroll
      for (int i = 0; i < kOwnValues; i += 2) {
        put(kOwnValues * lane + i, float2{mixed_[i], mixed_[i + 1]});
      }
    }
    if (lane == 0) put(d, float2{top_, sum_});
  }

 private:
  static __device__ int quad(int i) { return threadIdx.x % 4 + 4 * i; }

  float top_ = kMinusInfinity, sum_ = 0, mixed_[kOwnValues] = {};
};

}  // namespace tlinformer::cuda
