// One row through a LayerNorm that is folded into its product with weight matrices.
#pragma once

#include <type_traits>

#include "single_row.cuh"

namespace tlinformer::cuda::step {

// Calls f(std::integral_constant<int, MOST>{}) for a MOST of at least `count` parts.
template <class F>
void with_most(int count, const F& f) {
  if (count == 0) return f(std::integral_constant<int, 0>{});
  if (count <= kFewParts) return f(std::integral_constant<int, kFewParts>{});
  f(std::integral_constant<int, kMostParts>{});
}

// An element of x and of its parts, on their way.
template <int MOST>
class Summed {
 public:
  __device__ void load(const float* x, const float* parts, int count, bool inside) {
    x_ = inside ? __ldcg(x) : 0.0f;
    const int rows = inside ? count : 0;
#pragma unroll
    for (int i = 0; i < MOST; ++i) parts_[i] = i < rows ? __ldcg(parts + i * kPartPitch) : 0.0f;
  }
  __device__ float sum() const {
    float sum = x_;
#pragma unroll
    for (int i = 0; i < MOST; ++i) sum += parts_[i];
    return sum;
  }

 private:
  float x_, parts_[MOST > 0 ? MOST : 1];
};

// Keeps x w of float16 from overflowing; what it then lacks for small values, vector 1 has.
template <class T>
constexpr float kShrink = std::is_same_v<T, f16> ? 1.0f / 64 : 1.0f;

// A row of float32 through a LayerNorm. W (z w + b), where z = (x - mean) / deviation, is a sum of
// products of W with x w, with w and with b. These cost nothing, as mma multiplies eight columns
// anyway, and the mean and the deviation are found meanwhile. Vector 0 is x w in T, vector 1 what T
// lost of it, so that a large mean, which is subtracted later, costs no precision; 2 and 3 are w,
// b. If x has parts, at most MOST, a lane adds those of one element of each slice.
template <class T, int WARPS, int AHEAD, int MOST>
class FoldedRow {
 public:
  // Starts to fetch the parameters, which do not change within a token.
  __device__ FoldedRow(const Norm& norm, const float* x, const Parts& parts, int width)
      : parameters_(static_cast<const T*>(lane_.vector == 3 ? norm.bias : norm.weight) +
                    lane_.element),
        left_(width - lane_.element),
        has_x_(lane_.vector < 2),
        less_(lane_.vector == 1 ? -1.0f : 0.0f) {
    const int own = lane_.warp * kSlice + static_cast<int>(threadIdx.x % 32);
    x_ = x + (MOST == 0 ? lane_.element : own);
    if constexpr (MOST > 0) {
      parts_ = parts.rows + own;
      count_ = parts.count;
      left_own_ = width - own;
      from_lane_ = lane_.element - lane_.warp * kSlice;
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) load_parameters(i, i * WARPS);
  }
  __device__ void start() {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) load_x(i, i * WARPS);
  }
  __device__ void load(int i, int slices) {
    load_parameters(i, slices);
    load_x(i, slices);
  }

  // All lanes must call.
  __device__ uint2 at(int i) {
    const auto word = [&](uint32_t words, float2 x) {
      const float2 weight = unpack<T>(words);
      sums_.x += x.x + x.y;
      sums_.y += x.x * x.x;
      sums_.y += x.y * x.y;
      const float2 product = {kShrink<T> * x.x * weight.x, kShrink<T> * x.y * weight.y};
      const float2 kept = unpack<T>(pack<T>(product.x, product.y));
      const uint32_t own = pack<T>(product.x + less_ * kept.x, product.y + less_ * kept.y);
      return has_x_ ? own : words;
    };
    if constexpr (MOST > 0) {
      const float own = own_[i].sum();
      const auto of_lane = [&](int element) {
        return __shfl_sync(0xffffffffu, own, from_lane_ + element);
      };
      x_ahead_[i][0] = {of_lane(0), of_lane(1)};
      x_ahead_[i][1] = {of_lane(kOtherWord), of_lane(kOtherWord + 1)};
    }
    return {word(parameter_[i].x, x_ahead_[i][0]), word(parameter_[i].y, x_ahead_[i][1])};
  }

  // The sums of x and of its squares over the warp, in lanes 0 ... 7 and 16 ... 23; over that half
  // of the lanes alone.
  __device__ float2 measures() const { return add_lanes(half_measures(), 16); }
  __device__ float2 half_measures() const { return add_lanes(add_lanes(sums_, 1), 2); }

 private:
  static __device__ float2 add_lanes(float2 sums, int other) {
    return {sums.x + __shfl_xor_sync(0xffffffffu, sums.x, other),
            sums.y + __shfl_xor_sync(0xffffffffu, sums.y, other)};
  }
  __device__ void load_parameters(int i, int slices) {
    const int k = slices * kSlice;
    parameter_[i] = {load_word(parameters_ + k, k < left_),
                     load_word(parameters_ + k + kOtherWord, k < left_)};
  }
  __device__ void load_x(int i, int slices) {
    const int k = slices * kSlice;
    if constexpr (MOST > 0) {
      own_[i].load(x_ + k, parts_ + k, count_, k < left_own_);
      return;
    }
    x_ahead_[i][0] = x_ahead_[i][1] = {0, 0};
    if (has_x_ && k < left_) {
      x_ahead_[i][0] = __ldcg(reinterpret_cast<const float2*>(x_ + k));
      x_ahead_[i][1] = __ldcg(reinterpret_cast<const float2*>(x_ + k + kOtherWord));
    }
  }

  LaneOfB lane_;
  const float* x_;
  const T* parameters_;  // this lane's vector
  int left_;             // inputs from here on
  bool has_x_;
  float less_;
  float2 sums_ = {0, 0};
  uint2 parameter_[AHEAD];
  float2 x_ahead_[AHEAD][2];
  // With parts, of this lane's element.
  const float* parts_ = nullptr;
  int count_ = 0, left_own_ = 0, from_lane_ = 0;
  Summed<MOST> own_[AHEAD];
};

// W norm(x), from the sums of x and of its squares and from the products with a FoldedRow.
template <class T>
struct NormOf {
  float mean, scale;

  __device__ NormOf(float2 measures, float per_width, float epsilon)
      : mean(measures.x * per_width) {
    const float variance = fmaxf(measures.y * per_width - mean * mean, 0.0f);
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(scale) : "f"(variance + epsilon));
  }
  __device__ float apply(float with_x, float with_weight, float with_bias) const {
    return scale * (with_x / kShrink<T> - mean * with_weight) + with_bias;
  }
  // Of the sums that two neighbouring lanes have, to both.
  __device__ float apply(float2 own) const {
    const float part =
        threadIdx.x % 2 == 0 ? scale / kShrink<T> * (own.x + own.y) : own.y - scale * mean * own.x;
    return part + __shfl_xor_sync(0xffffffffu, part, 1);
  }
};

// Gate and up: warps of a block, and slices that each has in flight.
constexpr int kGateWarps = 16, kGateAhead = 1;

// norm(x) times the matrices. In the end the last warps of the block bring the sums of all
// together: each has 8 outputs, in each lane that of number lane % 8, the first matrix' before the
// second's.
template <class T, int MATRICES, int WARPS, int AHEAD, int MOST>
class NormedProduct {
  static constexpr int kOwn = 8, kUnits = kOwn / MATRICES, kFinishers = kTile / kUnits;
  static constexpr int kLaneWarps = WARPS / (32 / kOwn);  // whose sums a lane adds up

 public:
  struct Shared {
    float4 sums[WARPS][MATRICES * kTile];  // with x w, nothing, with w, with b; of a warp together
    float4 measures[WARPS];
  };

  __device__ NormedProduct(Shared& shared, const void* const (&matrices)[MATRICES], int outputs,
                           const Norm& norm, const float* x, const Parts& parts, int width)
      : shared_(shared),
        weights_(matrices, width, outputs),
        row_(norm, x, parts, width),
        epsilon_(norm.epsilon) {}

  // Whether the calling thread's warp is one of the last, and the output of its lane in the tile.
  __device__ bool finishes() const { return warp_ >= WARPS - kFinishers; }
  __device__ int output() const { return warp_ % kFinishers * kUnits + threadIdx.x % kUnits; }

  __device__ void start() { row_.start(); }
  // ONE_PASS: all slices are in flight.
  template <bool ONE_PASS = false>
  __device__ void multiply() {
    const int lane = threadIdx.x % 32, output = RowSums::own_output();
    weights_.template multiply<ONE_PASS>(row_);
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
      float4* const to =
          &shared_.sums[warp_][output / kUnits * kOwn + m * kUnits + output % kUnits];
      float2 own = weights_.sum(m);
      if (lane % 2 == 0) own.x += own.y;
      reinterpret_cast<float2*>(to)[lane % 2] = own;
    }
    const float2 measures = row_.half_measures();
    if (lane % 16 == 0) reinterpret_cast<float2*>(&shared_.measures[warp_])[lane / 16] = measures;
    __syncthreads();
  }

  // Of the lane's output.
  __device__ float value(float per_width) const {
    const int lane = threadIdx.x % 32, first = lane / kOwn * kLaneWarps;
    const int own = warp_ % kFinishers * kOwn + lane % kOwn;
    float sums[5] = {};  // with x w, with w, with b, of x, of its squares
#pragma unroll
    for (int i = 0; i < kLaneWarps; ++i) {
      const float4 part = shared_.sums[first + i][own], measures = shared_.measures[first + i];
      sums[0] += part.x;
      sums[1] += part.z;
      sums[2] += part.w;
      sums[3] += measures.x + measures.z;
      sums[4] += measures.y + measures.w;
    }
#pragma unroll
    for (int other = kOwn; other < 32; other *= 2) {
#pragma unroll
      for (float& sum : sums) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    }
    return NormOf<T>({sums[3], sums[4]}, per_width, epsilon_).apply(sums[0], sums[1], sums[2]);
  }

 private:
  int warp_ = warp_index();
  Shared& shared_;
  RowWeights<T, MATRICES, WARPS, AHEAD> weights_;
  FoldedRow<T, WARPS, AHEAD, MOST> row_;
  float epsilon_;
};

}  // namespace tlinformer::cuda::step
