// Products with one normed row, without norming it first: W (z w + b), where z = (x - mean) /
// deviation and w, b are the norm's parameters, is a sum of products of W with (x - first) w, with
// w and with b. Tensor cores multiply eight columns anyway, so these cost nothing, and the mean and
// the deviation, which every output needs, are found at the same time by the same barrier.
#pragma once

#include <type_traits>

#include "normed_rows.cuh"

namespace tlinformer::cuda::step {

// To be used as NormedRows. Column 0 is (x - x[0]) w in T, column 3 what T lost of it, so that a
// mean far from x[0], which is subtracted later, costs no precision; columns 1 and 2 are w and b.
template <class T, int AHEAD>
class FoldedNorm {
 public:
  static size_t bytes(int, int) { return sizeof(float2) * kWarps; }

  // Starts to fetch the parameters, which do not change within a token.
  __device__ FoldedNorm(void* shared, const Norm& norm, const float* x, int, int width)
      : x_(x),
        measures_(static_cast<float2*>(shared)),
        warp_(warp_index()),
        column_(threadIdx.x % 32 / 4),
        width_(width),
        epsilon_(norm.epsilon) {
    parameters_ = static_cast<const T*>(column_ == 2 ? norm.bias : norm.weight);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) load_parameters(i, warp_ + i * kWarps);
  }

  __device__ void measure() {
    // Volatile, so that volatile loads in front of measure() stay there.
    origin_ = *static_cast<const volatile float*>(x_);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) load_x(i, warp_ + i * kWarps);
  }
  __device__ void normalise() {}
  __device__ FoldedNorm& inputs() { return *this; }

  __device__ int columns() const { return 4; }
  __device__ void load(int i, int slice) {
    load_parameters(i, slice);
    load_x(i, slice);
  }

  __device__ uint4 at(int i, int slice, int) {
    const bool inside = has_x() && place(slice) < width_;
    const auto column = [&](uint32_t words, float low, float high) {
      const float2 weight = unpack<T>(words);
      const float2 off = {inside ? low - origin_ : 0.0f, inside ? high - origin_ : 0.0f};
      sums_.x += off.x + off.y;
      sums_.y += off.x * off.x + off.y * off.y;
      const float2 product = {kShrink * off.x * weight.x, kShrink * off.y * weight.y};
      const uint32_t rounded = pack<T>(product.x, product.y);
      const float2 kept = unpack<T>(rounded);
      const uint32_t lost = pack<T>(product.x - kept.x, product.y - kept.y);
      return has_x() ? (column_ == 0 ? rounded : lost) : words;
    };
    const float4 low = x_ahead_[i][0], high = x_ahead_[i][1];
    const uint4 words = parameter_[i];
    return {column(words.x, low.x, low.y), column(words.y, low.z, low.w),
            column(words.z, high.x, high.y), column(words.w, high.z, high.w)};
  }

  // After the last at(), before the barrier ahead of pair().
  __device__ void put_measures() const {
    float2 sums = sums_;
#pragma unroll
    for (int other = 1; other < 4; other *= 2) {
      sums.x += __shfl_xor_sync(0xffffffffu, sums.x, other);
      sums.y += __shfl_xor_sync(0xffffffffu, sums.y, other);
    }
    if (threadIdx.x % 32 == 0) measures_[warp_] = sums;
  }

  // By a whole warp, lane 8 c + i at column c, outputs 2 i and 2 i + 1, which lanes 0 ... 7 get.
  template <class Blocks>
  __device__ float2 pair(const Blocks& blocks, int matrix, int column, int output) const {
    const float2 sums = blocks.pair(matrix, column, output);
    float2 measure = measures_[threadIdx.x % kWarps];
#pragma unroll
    for (int other = 1; other < kWarps; other *= 2) {
      measure.x += __shfl_xor_sync(0xffffffffu, measure.x, other);
      measure.y += __shfl_xor_sync(0xffffffffu, measure.y, other);
    }
    const float mean = __fdividef(measure.x, width_);
    const float scale = rsqrtf(__fdividef(measure.y, width_) - mean * mean + epsilon_);
    const auto finish = [&](float sum) {
      const float of_weight = __shfl_down_sync(0xffffffffu, sum, 8);
      const float of_bias = __shfl_down_sync(0xffffffffu, sum, 16);
      const float lost = __shfl_down_sync(0xffffffffu, sum, 24);
      return scale * ((sum + lost) / kShrink - mean * of_weight) + of_bias;
    };
    return {finish(sums.x), finish(sums.y)};
  }

 private:
  // Keeps float16 from overflowing; what it then lacks for small values, column 3 has.
  static constexpr float kShrink = std::is_same_v<T, f16> ? 1.0f / 64 : 1.0f;

  __device__ bool has_x() const { return column_ == 0 || column_ == 3; }
  __device__ int place(int slice) const { return slice * kSlice + threadIdx.x % 4 * 8; }

  __device__ void load_parameters(int i, int slice) {
    const int k = place(slice);
    parameter_[i] = load_vector(parameters_ + k, column_ < 4 && k < width_);
  }

  __device__ void load_x(int i, int slice) {
    const int k = place(slice);
    const bool mine = has_x() && k < width_;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      x_ahead_[i][half] = {0, 0, 0, 0};
      if (mine) x_ahead_[i][half] = __ldcg(reinterpret_cast<const float4*>(x_ + k) + half);
    }
  }

  const float* x_;
  const T* parameters_;  // this lane's column of B
  float2* measures_;
  int warp_, column_, width_;
  float epsilon_, origin_ = 0;
  float2 sums_ = {0, 0};  // of differences from x[0], and of their squares
  uint4 parameter_[AHEAD];
  float4 x_ahead_[AHEAD][2];
};

}  // namespace tlinformer::cuda::step
