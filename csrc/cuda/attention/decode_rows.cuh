// Attention of a few query heads over rows in shared memory, on CUDA cores: one query has no
// matrix product. A row belongs to one or a few lanes, which keep their own softmax of their rows.
#pragma once

#include <cmath>

#include "../numeric.cuh"

namespace tlinformer::cuda {

constexpr int kDecodeWarps = 8;
constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr float kMinusInfinity = -INFINITY;

// How the rows of D elements are dealt to lanes which attend with H query heads at once.
template <int D, int H>
struct RowLayout {
  static constexpr int kRowBytes = 2 * D;
  static constexpr int kWide = D % 8 == 0 ? 8 : 4;  // elements of one shared load
  static constexpr int kLoadBytes = 2 * kWide;
  static constexpr int kLoadsOfRow = D / kWide;

  // Lanes of a row: enough that queries and outputs fit the registers.
  static constexpr int lanes_of_row() {
    int lanes = 1;
    while (H * D / lanes > (H == 1 ? 40 : 64) && kLoadsOfRow % (2 * lanes) == 0) lanes *= 2;
    return lanes;
  }
  static constexpr int kLanes = lanes_of_row();
  static constexpr int kRows = 32 / kLanes;  // rows of a warp at a time
  static constexpr int kOwn = D / kLanes;    // elements of a row in a lane
  static constexpr int kLoads = kOwn / kWide;

  // The eight lanes that a 16-byte shared load serves together must meet all eight 16-byte groups
  // of banks. Rows kPeriod apart begin in the same group, so they take their loads in an order of
  // their own: load i of a lane is number (i ^ swizzle(lane)) kLanes + lane % kLanes of the row.
  // (8-byte loads of 72-byte rows meet all banks as they are.)
  static constexpr int kCommon = kLoadsOfRow % 8 == 0   ? 8
                                 : kLoadsOfRow % 4 == 0 ? 4
                                 : kLoadsOfRow % 2 == 0 ? 2
                                                        : 1;
  static constexpr int kPeriod = 8 / kCommon;
  static constexpr int kOrders = kWide == 8 && kCommon > kLanes ? kCommon / kLanes : 1;
  __device__ static int swizzle(int lane) { return lane / kLanes / kPeriod & (kOrders - 1); }

  // At the end the sums over lanes are dealt to them: kKept in a lane after the bits of the lane
  // number that decide its order, of which kSums are left after the others.
  static constexpr int kOrderBit = kLanes * kPeriod;
  static constexpr int kOrderBits = kOrderBit * (kOrders - 1);
  static constexpr int kKept = kOwn / kOrders;
  static constexpr int sums_of_lane() {
    int count = kKept;
    for (int bit = kLanes; bit < 32; bit *= 2)
      if ((kOrderBits & bit) == 0) count = (count + 1) / 2;
    return count;
  }
  static constexpr int kSums = sums_of_lane();

  // Copies begin on an even row where rows are not a multiple of 16 bytes.
  static constexpr int kAligned = kRowBytes % 16 == 0 ? 1 : 2;
  static_assert(kOwn % kWide == 0);
};

template <class T>
__device__ inline void load_row(const char* from, float (&x)[8]) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  const float2 a = unpack<T>(words.x), b = unpack<T>(words.y), c = unpack<T>(words.z),
               d = unpack<T>(words.w);
  x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y, x[4] = c.x, x[5] = c.y, x[6] = d.x, x[7] = d.y;
}
template <class T>
__device__ inline void load_row(const char* from, float (&x)[4]) {
  const uint2 words = *reinterpret_cast<const uint2*>(from);
  const float2 a = unpack<T>(words.x), b = unpack<T>(words.y);
  x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
}

// A softmax under way: sum of exp2(score - top) and of the same times values. No score exceeds top
// by more than 8, so that a slowly rising maximum seldom rescales.
template <int D, int H>
struct PartialSoftmax {
  float output[H][D];
  float top[H], sum[H];  // sum 0: of no rows
};

// One element of a head's output over all warps of a block, before the division by `sum`.
struct MergedElement {
  float output = 0, top = kMinusInfinity, sum = 0;

  template <int D, int H>
  __device__ MergedElement(const PartialSoftmax<D, H>* warps, int h, int e) {
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) top = fmaxf(top, warps[w].top[h]);
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      if (warps[w].sum[h] == 0) continue;
      const float weight = exp2_fast(warps[w].top[h] - top);
      sum += weight * warps[w].sum[h];
      output += weight * warps[w].output[h][e];
    }
  }
};

// What a lane has of H query heads: its elements of the queries, and the softmax of its rows.
template <class T, int D, int H>
struct LaneRows {
  using Layout = RowLayout<D, H>;
  float query[H][Layout::kOwn];
  float output[H][Layout::kOwn];
  float top[H], sum[H];

  // Of `heads` heads; the others attend with zeros.
  __device__ void load_queries(const float* from, int heads, int lane) {
#pragma unroll
    for (int h = 0; h < H; ++h) {
#pragma unroll
      for (int i = 0; i < Layout::kLoads; ++i) {
        const int load = (i ^ Layout::swizzle(lane)) * Layout::kLanes + lane % Layout::kLanes;
#pragma unroll
        for (int e = 0; e < Layout::kWide; e += 4) {
          float4 x = make_float4(0, 0, 0, 0);
          if (h < heads) {
            x = __ldcg(reinterpret_cast<const float4*>(from + h * D + load * Layout::kWide + e));
          }
          float* to = &query[h][i * Layout::kWide + e];
          to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
        }
      }
    }
  }

  __device__ void clear() {
#pragma unroll
    for (int h = 0; h < H; ++h) {
      top[h] = kMinusInfinity;
      sum[h] = 0;
#pragma unroll
      for (int e = 0; e < Layout::kOwn; ++e) output[h][e] = 0;
    }
  }

  // By all lanes, over `rows` >= 1 rows of a stage; what follows them may be NaN and is not read.
  __device__ void add(const char* keys, const char* values, int rows, int lane) {
    constexpr int kChains = H == 1 ? 4 : H == 2 ? 2 : 1;  // of dependent additions
    const int swizzle = Layout::swizzle(lane);
#pragma unroll 1
    for (int first = 0; first < rows; first += Layout::kRows) {
      const int row = first + lane / Layout::kLanes;
      const bool exists = row < rows;
      const char* key = keys + min(row, rows - 1) * Layout::kRowBytes +
                        lane % Layout::kLanes * Layout::kLoadBytes;
      float chains[H][kChains] = {}, weight[H];
#pragma unroll
      for (int i = 0; i < Layout::kLoads; ++i) {
        float x[Layout::kWide];
        load_row<T>(key + (i ^ swizzle) * (Layout::kLanes * Layout::kLoadBytes), x);
#pragma unroll
        for (int e = 0; e < Layout::kWide; ++e) {
#pragma unroll
          for (int h = 0; h < H; ++h)
            chains[h][e % kChains] += query[h][i * Layout::kWide + e] * x[e];
        }
      }
#pragma unroll
      for (int h = 0; h < H; ++h) {
        float score = chains[h][0];
#pragma unroll
        for (int c = 1; c < kChains; ++c) score += chains[h][c];
#pragma unroll
        for (int distance = 1; distance < Layout::kLanes; distance *= 2)
          score += __shfl_xor_sync(0xffffffffu, score, distance);
        if (exists && score > top[h] + 8.0f) {
          const float scale = exp2_fast(top[h] - score);
          top[h] = score;
          sum[h] *= scale;
#pragma unroll
          for (int e = 0; e < Layout::kOwn; ++e) output[h][e] *= scale;
        }
        weight[h] = exists ? exp2_fast(score - top[h]) : 0.0f;
        sum[h] += weight[h];
      }
      const char* value = key + (values - keys);
#pragma unroll
      for (int i = 0; i < Layout::kLoads; ++i) {
        float x[Layout::kWide];
        load_row<T>(value + (i ^ swizzle) * (Layout::kLanes * Layout::kLoadBytes), x);
#pragma unroll
        for (int e = 0; e < Layout::kWide; ++e) {
#pragma unroll
          for (int h = 0; h < H; ++h) output[h][i * Layout::kWide + e] += weight[h] * x[e];
        }
      }
    }
  }

  // By all lanes: the softmax of all rows of the warp.
  __device__ void store(PartialSoftmax<D, H>& to, int lane) {
    constexpr int kOrders = Layout::kOrders, kWide = Layout::kWide, kKept = Layout::kKept;
#pragma unroll
    for (int h = 0; h < H; ++h) {
      const float peak = warp_max(top[h]);
      const float scale = top[h] == kMinusInfinity ? 0.0f : exp2_fast(top[h] - peak);
      float total = sum[h] * scale;
#pragma unroll
      for (int distance = Layout::kLanes; distance < 32; distance *= 2)
        total += __shfl_xor_sync(0xffffffffu, total, distance);
      if (lane == 0) {
        to.top[h] = peak;
        to.sum[h] = total;
      }
#pragma unroll
      for (int e = 0; e < Layout::kOwn; ++e) output[h][e] *= scale;
      // Lanes whose orders differ in one bit have the same part of the row in loads i and i ^ bit:
      // each keeps the sums of its loads without the bit.
#pragma unroll
      for (int bit = 1; bit < kOrders; bit *= 2) {
#pragma unroll
        for (int i = 0; i < Layout::kLoads; i += 2 * bit) {
#pragma unroll
          for (int e = 0; e < kWide; ++e) {
            output[h][i * kWide + e] += __shfl_xor_sync(
                0xffffffffu, output[h][(i + bit) * kWide + e], Layout::kOrderBit * bit);
          }
        }
      }
      float kept[kKept];
#pragma unroll
      for (int e = 0; e < kKept; ++e) kept[e] = output[h][e / kWide * kOrders * kWide + e % kWide];
      int begin = 0, count = kKept;
      sum_scattered<kKept, Layout::kLanes, Layout::kOrderBits>(kept, lane, begin, count);
#pragma unroll
      for (int e = 0; e < Layout::kSums; ++e) {
        const int at = begin + e;
        const int load =
            (at / kWide * kOrders + Layout::swizzle(lane)) * Layout::kLanes + lane % Layout::kLanes;
        if (e < count) to.output[h][load * kWide + at % kWide] = kept[e];
      }
    }
  }
};

}  // namespace tlinformer::cuda
