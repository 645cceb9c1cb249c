// A warp's 32 cached rows against up to four queries, on tensor cores: a query has two of the eight
// rows that an mma multiplies, its values rounded to T and what the rounding lost, as have its
// weights later. So the products are exact to more than T, and rows cost a load a word and little
// else.
#pragma once

#include "../numeric.cuh"

namespace tlinformer::cuda {

constexpr int kUnit = 32;        // rows
constexpr int kUnitQueries = 4;  // at a time

// Lane 4 g + q has query g / 2, its rounded part or (g odd) the rest, and rows 8 t + 2 q + j.
template <class T, int d>
class UnitAttention {
  static constexpr int kSteps = (d + 15) / 16, kChunks = (d + 31) / 32;

 public:
  // `queries` in global memory, rows of d; those from `count` on are zero.
  __device__ void load_queries(const float* queries, int count) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int element = 16 * s + 4 * q();
      query_[s] = {0, 0, 0, 0};
      if (query() < count && element < d) {
        query_[s] = __ldcg(reinterpret_cast<const float4*>(queries + query() * d + element));
      }
    }
  }

  // A dot product allows any order of its elements: lane q takes four neighbours of every sixteen.
  // The scores of rows from `rows` on are -infinity, whatever they hold.
  __device__ void score(const T* keys, int rows) {
    uint2 parts[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      parts[s] = {part(query_[s].x, query_[s].y), part(query_[s].z, query_[s].w)};
    }
    float c[kTiles][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int element = 16 * s + 4 * q();
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        uint2 words = {0, 0};
        if (element < d) {
          words = *reinterpret_cast<const uint2*>(keys + (8 * t + g()) * d + element);
        }
        mma<T>(c[t], {parts[s].x, 0, parts[s].y, 0}, words.x, words.y);
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float both = c[t][j] + __shfl_xor_sync(0xffffffffu, c[t][j], 4);
        weight_[t][j] = 8 * t + 2 * q() + j < rows ? both : -INFINITY;
      }
    }
  }

  // Of this lane's query.
  __device__ float greatest() const {
    float most = -INFINITY;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) most = fmaxf(most, fmaxf(weight_[t][0], weight_[t][1]));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    return fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
  }

  // record <- sums of exp2(score - most) value (d) and, at [d], of exp2(score - most); of query i
  // at record + i stride, for the first `count`. Values of rows from `rows` on are not read.
  __device__ void attend(const T* values, int rows, float most, float* record, int stride,
                         int count) {
    float sum = 0;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) sum += weight_[t][j] = exp2_fast(weight_[t][j] - most);
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const bool odd = g() % 2 != 0;
    float* const to = record + query() * stride;
    if (query() < count && q() == 0 && !odd) to[d] = sum;
    uint32_t parts[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) parts[t] = part(weight_[t][0], weight_[t][1]);
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int column = 32 * chunk + 4 * g();
      float c[4][4] = {};  // of elements 4 n + j of the chunk
#pragma unroll
      for (int half = 0; half < kUnit / 16; ++half) {
        uint2 words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 16 * half + 2 * q() + i % 2 + i / 2 * 8;
          words[i] = {0, 0};
          if (row < rows && column < d) {
            words[i] = *reinterpret_cast<const uint2*>(values + row * d + column);
          }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t selector = j % 2 == 0 ? 0x5410 : 0x7632;
          const auto two = [&](int i) {
            return j < 2 ? __byte_perm(words[i].x, words[i + 1].x, selector)
                         : __byte_perm(words[i].y, words[i + 1].y, selector);
          };
          mma<T>(c[j], {parts[2 * half], 0, parts[2 * half + 1], 0}, two(0), two(2));
        }
      }
      // The even lane of a query keeps elements 4 (2 q) + j, the odd one the four behind them.
      float4 all;
      const auto both = [&](const float (&two)[4]) {
        return (odd ? two[1] : two[0]) + __shfl_xor_sync(0xffffffffu, odd ? two[0] : two[1], 4);
      };
      all = {both(c[0]), both(c[1]), both(c[2]), both(c[3])};
      const int element = 32 * chunk + 8 * q() + 4 * odd;
      if (query() < count && element < d) *reinterpret_cast<float4*>(to + element) = all;
    }
  }

  __device__ static int query() { return g() / 2; }

 private:
  static constexpr int kTiles = kUnit / 8;
  __device__ static int g() { return threadIdx.x % 32 / 4; }
  __device__ static int q() { return threadIdx.x % 4; }

  // This lane's part of two numbers.
  __device__ static uint32_t part(float low, float high) {
    const uint32_t rounded = pack<T>(low, high);
    const float2 kept = unpack<T>(rounded);
    return g() % 2 == 0 ? rounded : pack<T>(low - kept.x, high - kept.y);
  }

  float4 query_[kSteps];
  float weight_[kTiles][2];  // first the scores
};

}  // namespace tlinformer::cuda
