// A warp's attention of up to eight queries to cached rows in shared memory, by tensor cores.
#pragma once

#include <type_traits>

#include "decode_rows.cuh"

namespace tlinformer::cuda {

// In both products, of queries with keys and of weights with values, the queries are rows 0 ... 7
// of an mma's A operand, and rows 8 ... 15 are what rounding these to T has lost: the sums of both
// halves are nearly those of float32. Lane 4 g + q has query g. Of 16 rows it has rows 4 q ... 4 q
// + 3: two scores of each of two mma tiles, and they are its operand of the product with the
// values.
template <class T, int d, int ROWS>
class MmaRows {
  static_assert(ROWS % 16 == 0);
  // Keys: a dot product allows any order of its inputs. Lane 4 g + q loads vectors q, q + 4, ... of
  // a row; half of 8 bytes is an operand as it lies. Vectors past the end are the last one again,
  // and the queries zero.
  using Vector = std::conditional_t<d % 8 == 0, uint4, uint2>;
  static constexpr int kWidth = sizeof(Vector) / sizeof(T);
  static constexpr int kVectors = (d / kWidth + 3) / 4, kSteps = kVectors * kWidth / 4;
  static constexpr int kTiles = ROWS / 8, kHalves = ROWS / 16;
  // Values: columns in groups of 32, of which lane 4 g + q loads elements 4 g ... 4 g + 3, and what
  // is left in one of 16 or 8. Element t of these is column g of the group's tile t.
  static constexpr int kWideGroups = d / 32, kRest = d % 32;
  // Where rows begin in the same bank, half of the lanes load two groups the other way around.
  static constexpr int kTogether = d % 64 == 0 ? 2 : 1;
  static constexpr int kRestTiles = kRest > 8 ? 2 : kRest > 0 ? 1 : 0;
  static constexpr int kColumnTiles = 4 * kWideGroups + kRestTiles;

 public:
  static constexpr int kQueries = 8;

  struct Query {
    uint32_t words[kSteps][4];
  };
  // Where a lane's elements of its query begin. Of fewer than eight the last is there several
  // times. The address is found here and not where it is used.
  static __device__ const float* own_query(const float* queries, int count) {
    const float* own = queries + min(row(), count - 1) * d + element(0);
    asm volatile("" : "+l"(own));
    return own;
  }
  // Its elements on their way. Past the L1 cache: a kernel that may still have run when this one
  // began has written them.
  struct LoadedQuery {
    float4 quads[kSteps];
  };
  static __device__ LoadedQuery load(const float* own) {
    LoadedQuery loaded;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      int at = element(s) - element(0);
      if (at + 3 * kWidth + 4 > d) at = min(at, d - 4 - element(0));
      loaded.quads[s] = __ldcg(reinterpret_cast<const float4*>(own + at));
    }
    return loaded;
  }
  static __device__ Query round(const LoadedQuery& loaded) {
    Query query;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      float4 x = loaded.quads[s];
      if (element(s) >= d) x = {0, 0, 0, 0};
      round(x.x, x.y, query.words[s][0], query.words[s][1]);
      round(x.z, x.w, query.words[s][2], query.words[s][3]);
    }
    return query;
  }

  // Adds `rows` >= 1 rows. What follows them up to ROWS may be NaN in keys, not in values.
  __device__ void add(const Query& query, const T* keys, const T* values, int rows) {
    float score[kTiles][4] = {};
    const T* const key = keys + (row() / 2 * 4 + row() % 2) * d;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      int at = (4 * v + quarter()) * kWidth;
      if (4 * (v + 1) * kWidth > d) at = min(at, d - kWidth);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const T* const from = key + (t / 2 * 16 + t % 2 * 2) * d + at;
        const Vector words = *reinterpret_cast<const Vector*>(from);
        mma<T>(score[t], query.words[v * kWidth / 4], words.x, words.y);
        if constexpr (kWidth == 8) mma<T>(score[t], query.words[2 * v + 1], words.z, words.w);
      }
    }
    float higher = top_;
    const int own_rows = rows - 4 * quarter();  // after the lane's first
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) score[t][i] += score[t][i + 2];
      const int first = t / 2 * 16 + t % 2 * 2;
      if (first >= own_rows) score[t][0] = kMinusInfinity;
      if (first + 1 >= own_rows) score[t][1] = kMinusInfinity;
      higher = fmaxf(higher, fmaxf(score[t][0], score[t][1]));
    }
    higher = fmaxf(higher, __shfl_xor_sync(0xffffffffu, higher, 1));
    higher = fmaxf(higher, __shfl_xor_sync(0xffffffffu, higher, 2));
    const float scale = exp2_fast(top_ - higher);
    top_ = higher;
    sum_ *= scale;
    uint32_t weights[kHalves][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const float first = exp2_fast(score[t][0] - higher), second = exp2_fast(score[t][1] - higher);
      sum_ += first + second;
      round(first, second, weights[t / 2][t % 2 * 2], weights[t / 2][t % 2 * 2 + 1]);
    }
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (float& x : mixed_[c]) x *= scale;
    }
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const T* const from = values + (16 * h + 4 * quarter()) * d;
#pragma unroll
      for (int w = 0; w < kWideGroups; w += kTogether) {
        uint2 value[kTogether][4];
        const int swapped = kTogether == 2 ? quarter() % 2 : 0;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            const T* const group = from + r * d + 32 * (w + (i ^ swapped));
            value[i][r] = *reinterpret_cast<const uint2*>(group + 4 * row());
          }
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          Words low, high;
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const uint2 words = swapped == 0 ? value[i][r] : value[kTogether - 1 - i][r];
            low.of_row[r] = words.x, high.of_row[r] = words.y;
          }
          mix(&mixed_[4 * (w + i)], weights[h], low);
          mix(&mixed_[4 * (w + i) + 2], weights[h], high);
        }
      }
      if constexpr (kRest > 0) {
        // A lane's word has both its columns, or the one that its parity says.
        const int word = kRestTiles == 2 ? row() : row() / 2 % (kRest / 2);
        Words value;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          value.of_row[r] =
              *reinterpret_cast<const uint32_t*>(from + r * d + 32 * kWideGroups + 2 * word);
        }
        if constexpr (kRestTiles == 2) {
          mix(&mixed_[4 * kWideGroups], weights[h], value);
        } else {
          mix_half(mixed_[4 * kWideGroups], weights[h], value, row() % 2 ? kHigh : kLow);
        }
      }
    }
  }

  // Of the softmax over all added rows, for each of the first `count` queries: put(i, pair) of the
  // sums of the values, pairs of (d), and behind them of the greatest score with the sum of the
  // weights relative to it.
  template <class Put>
  __device__ void finish(int count, const Put& put) const {
    float sum = sum_ + __shfl_xor_sync(0xffffffffu, sum_, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (row() >= count) return;
#pragma unroll
    for (int w = 0; w < kWideGroups; ++w) put_group<4>(put, 32 * w, &mixed_[4 * w]);
    if constexpr (kRest > 0) {
      put_group<kRestTiles>(put, 32 * kWideGroups, &mixed_[4 * kWideGroups]);
    }
    if (quarter() == 0) put(d, float2{top_, sum});
  }

 private:
  struct Words {
    uint32_t of_row[4];
  };
  static constexpr uint32_t kLow = 0x5410, kHigh = 0x7632;  // halves of two words, as a word

  static __device__ int row() { return threadIdx.x % 32 / 4; }
  static __device__ int quarter() { return threadIdx.x % 4; }
  // The first of a lane's four of a query in a step.
  static __device__ int element(int step) {
    constexpr int kOfVector = kWidth / 4;
    return (4 * (step / kOfVector) + quarter()) * kWidth + step % kOfVector * 4;
  }

  static __device__ void round(float low, float high, uint32_t& rounded, uint32_t& lost) {
    rounded = pack<T>(low, high);
    const float2 back = unpack<T>(rounded);
    lost = pack<T>(low - back.x, high - back.y);
  }

  static __device__ void mix_half(float (&to)[4], const uint32_t (&weights)[4], const Words& value,
                                  uint32_t half) {
    mma<T>(to, weights, __byte_perm(value.of_row[0], value.of_row[1], half),
           __byte_perm(value.of_row[2], value.of_row[3], half));
  }
  static __device__ void mix(float (*to)[4], const uint32_t (&weights)[4], const Words& value) {
    mix_half(to[0], weights, value, kLow);
    mix_half(to[1], weights, value, kHigh);
  }

  // Columns 2 q and 2 q + 1 of W tiles are W elements each, one after the other.
  template <int W, class Put>
  static __device__ void put_group(const Put& put, int first, const float (*tiles)[4]) {
    const auto element = [&](int i) { return tiles[i % W][i / W] + tiles[i % W][i / W + 2]; };
#pragma unroll
    for (int i = 0; i < 2 * W; i += 2) {
      const int at = first + 2 * W * quarter() + i;
      if (at < d) put(at, float2{element(i), element(i + 1)});
    }
  }

  float top_ = kMinusInfinity, sum_ = 0, mixed_[kColumnTiles][4] = {};
};

}  // namespace tlinformer::cuda
