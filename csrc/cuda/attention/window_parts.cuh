// What attention to few rows keeps in shared memory, how a new row gets there, and the merge of
// warps' softmaxes: first a single sequence's, by a block, then a batch's, by a warp.
#pragma once

#include "eight_rows.cuh"

namespace tlinformer::cuda {

constexpr int kWindowCluster = 8;  // most blocks of a head

// What a block of `blocks` for a head keeps, in bytes: `tiles` of ROWS keys and values; of the
// queries that this block merges and of both softmaxes, the records of all warps, RECORD floats
// apart.
template <int d, int WARPS, int ROWS, int RECORD = d + 2>
struct WindowPlaces {
  // The first of an odd number of rows may lie behind one more, where copies may begin.
  static constexpr int kAligned = d % 8 == 0 ? 1 : 2;
  static constexpr int kTileBytes = ((ROWS + kAligned - 1) * d * 2 + 15) / 16 * 16;
  static constexpr int kRecord = RECORD;
  int records, end;

  // Tiles of a block for all of its rows.
  static int tiles_of(int most_rows, int blocks) {
    return (most_rows / ROWS + 2 + blocks - 1) / blocks;
  }
  __host__ __device__ WindowPlaces(int tiles, int group, int blocks) {
    const int warps = blocks * WARPS;
    records = tiles * 2 * kTileBytes;
    end = records + (group + blocks - 1) / blocks * 2 * warps * kRecord * 4;
  }
};

// A key and its value on their way into a warp's tile, 4 elements at a time.
template <class T, int d>
class NewRow {
  static constexpr int kQuads = d / 4, kLoads = (2 * kQuads + 31) / 32;

 public:
  __device__ void aim(const T* key, const T* value, T* to_key, T* to_value) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int quad = threadIdx.x % 32 + 32 * i;
      const bool is_key = quad < kQuads;
      const int at = 4 * (is_key ? quad : quad - kQuads);
      if (quad >= 2 * kQuads) continue;
      from_[i] = (is_key ? key : value) + at;
      to_[i] = (is_key ? to_key : to_value) + at;
    }
  }
  __device__ void load() {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (to_[i] != nullptr) words_[i] = __ldcg(reinterpret_cast<const uint2*>(from_[i]));
    }
  }
  __device__ void store() const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (to_[i] != nullptr) *reinterpret_cast<uint2*>(to_[i]) = words_[i];
    }
  }

 private:
  uint2 words_[kLoads];
  const T* from_[kLoads];
  T* to_[kLoads] = {};
};

// A warp's part of one softmax's output from the records of `count` warps: of every STEP-th of
// them, from `first` on, over the weights of all. All zeros of none.
template <class T, int d, int WARPS, int STEP>
__device__ void merge_records(const float* records, int count, int first, float* to) {
  using Rows = EightRows<T, d>;
  constexpr int kRecord = d + 2, kMost = kWindowCluster * WARPS / 32;
  const int lane = threadIdx.x % 32;
  float2 measure[kMost];
  float most = kMinusInfinity;
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int r = lane + 32 * i;
    measure[i] = {kMinusInfinity, 0};
    if (r < count) measure[i] = *reinterpret_cast<const float2*>(records + r * kRecord + d);
    most = fmaxf(most, measure[i].x);
  }
  most = warp_max(most);
  float weight[kMost], total = 0, sums[Rows::kOwnValues] = {};
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    weight[i] = count > 0 ? exp2_fast(measure[i].x - most) : 0.0f;
    total += weight[i] * measure[i].y;
  }
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (32 * i >= count) break;
#pragma unroll
    for (int j = 0; j < 32 / STEP; ++j) {
      const int r = STEP * j + first;
      const float own = __shfl_sync(0xffffffffu, weight[i], r);
      if (lane >= Rows::kValueLanes) continue;
      // The last record again does no harm with a weight of zero.
      const float* const from = records + min(r + 32 * i, count - 1) * kRecord;
#pragma unroll
      for (int e = 0; e < Rows::kOwnValues; e += 2) {
        const float2 x = *reinterpret_cast<const float2*>(from + Rows::kOwnValues * lane + e);
        sums[e] += own * x.x;
        sums[e + 1] += own * x.y;
      }
    }
  }
  total = warp_sum(total);
  const float scale = total > 0 ? __fdividef(1.0f, total) : total;
  if (lane >= Rows::kValueLanes) return;
#pragma unroll
  for (int e = 0; e < Rows::kOwnValues; e += 2) {
    *reinterpret_cast<float2*>(to + Rows::kOwnValues * lane + e) = {sums[e] * scale,
                                                                    sums[e + 1] * scale};
  }
}

// By a warp, half of it a softmax: a query's output from the records of the warps that have had
// rows of the softmax.
template <class T, int d, int RECORD>
__device__ void merge_softmaxes(const float* records, int count, T* output) {
  constexpr int kVectors = (d + 63) / 64;  // of four elements, in a lane
  constexpr int kLoads = 8 / kVectors;     // records in flight
  const int lane = threadIdx.x % 16;
  float4 total[kVectors] = {};
  float top = kMinusInfinity, sum = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += kLoads) {
    float2 measure[kLoads];
    float4 part[kLoads][kVectors];
    float peak = top;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      // The last record again does no harm with a weight of zero.
      const float* const from = records + min(first + i, count - 1) * RECORD;
      measure[i] = *reinterpret_cast<const float2*>(from + d);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int at = min(4 * (lane + 16 * v), d - 4);
        part[i][v] = *reinterpret_cast<const float4*>(from + at);
      }
      peak = fmaxf(peak, measure[i].x);
    }
    const float scale = exp2_fast(top - peak);
    top = peak;
    sum *= scale;
#pragma unroll
    for (float4& x : total) x.x *= scale, x.y *= scale, x.z *= scale, x.w *= scale;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float weight = first + i < count ? exp2_fast(measure[i].x - peak) : 0.0f;
      sum += weight * measure[i].y;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        total[v].x += weight * part[i][v].x, total[v].y += weight * part[i][v].y;
        total[v].z += weight * part[i][v].z, total[v].w += weight * part[i][v].w;
      }
    }
  }
  const float scale = count > 0 ? __fdividef(1.0f, sum) : 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const auto both = [&](float x) {
      x *= scale;
      return x + __shfl_xor_sync(0xffffffffu, x, 16);
    };
    const float x = both(total[v].x), y = both(total[v].y), z = both(total[v].z),
                w = both(total[v].w);
    const int at = 4 * (lane + 16 * v);
    if (threadIdx.x % 32 < 16 && at < d) {
      *reinterpret_cast<uint2*>(output + at) = {pack<T>(x, y), pack<T>(z, w)};
    }
  }
}

}  // namespace tlinformer::cuda
