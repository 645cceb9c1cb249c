// LayerNorm of a token's rows, as the B operand of products: each warp normalises its own slices,
// in registers, and all of a block share what they find of the rows' means and deviations.
#pragma once

#include "product.h"
#include "weight_stream.cuh"

namespace tlinformer::cuda::step {

// At most 8 NT rows of float32. Of every row a lane has the inputs that WeightStream says, of
// slices warp, warp + WARPS ...; AHEAD of them are in registers at once. at() takes slices in the
// order that WeightStream::multiply() does.
template <class T, int NT, int WARPS, int AHEAD>
class NormedRows {
 public:
  struct Shared {
    float2 sums[WARPS][8 * NT];
  };

  // Starts to fetch the parameters, which do not change within a token.
  __device__ NormedRows(Shared& shared, const Norm& norm, const float* x, int rows, int width)
      : shared_(shared), width_(width), warp_(warp_index()), epsilon_(norm.epsilon) {
    const int g = threadIdx.x % 32 / 4, own = warp_ * kSlice + threadIdx.x % 4 * 8;
    weight_ = static_cast<const T*>(norm.weight) + own;
    bias_ = static_cast<const T*>(norm.bias) + own;
    left_ = width - own;
    x_ = x + own;
#pragma unroll
    for (int n = 0; n < NT; ++n) row_[n] = min(8 * n + g, rows - 1) * width;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) load_parameters(i, i * WARPS);
  }

  // Finds the mean and the deviation of each row from the sums of its differences from its first
  // value, and of their squares: one pass. Any value of a row is within sqrt(width) standard
  // deviations of the mean: the cancellation in the variance costs at most a factor of width in
  // precision.
  __device__ void measure() {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    float first[NT];
    float2 sum[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      first[n] = __ldcg(x_ + row_[n] + left_ - width_);
      sum[n] = {0, 0};
    }
    const int slices = ceil_div(width_, kSlice), stride = AHEAD * WARPS;
#pragma unroll 1
    for (int chunk = (slices - 1) / stride * stride; chunk >= 0; chunk -= stride) {
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) load_x(i, chunk + i * WARPS);
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const bool inside = (chunk + i * WARPS) * kSlice < left_;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const float difference = inside ? x_ahead_[i][n][e] - first[n] : 0.0f;
            sum[n].x += difference;
            sum[n].y += difference * difference;
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      sum[n] = of_row(sum[n]);
      if (q == 0) shared_.sums[warp_][8 * n + g] = sum[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      sum[n] = {0, 0};
#pragma unroll
      for (int warp = 0; warp < WARPS; warp += 4) {
        const float2 part = shared_.sums[warp + q][8 * n + g];
        sum[n] = {sum[n].x + part.x, sum[n].y + part.y};
      }
      sum[n] = of_row(sum[n]);
      const float shifted = __fdividef(sum[n].x, width_);
      mean_[n] = first[n] + shifted;
      scale_[n] = rsqrtf(__fdividef(sum[n].y, width_) - shifted * shifted + epsilon_);
    }
  }

  // `slice` counts from the warp's first one.
  __device__ void load(int i, int slice) {
    load_parameters(i, slice - warp_);
    load_x(i, slice - warp_);
  }
  __device__ uint4 at(int i, int, int n) const {
    const float* const x = x_ahead_[i][n];
    const auto word = [&](int e, uint32_t weight, uint32_t bias) {
      const float2 w = unpack<T>(weight), b = unpack<T>(bias);
      return pack<T>((x[e] - mean_[n]) * scale_[n] * w.x + b.x,
                     (x[e + 1] - mean_[n]) * scale_[n] * w.y + b.y);
    };
    const uint4 w = weight_ahead_[i], b = bias_ahead_[i];
    return {word(0, w.x, b.x), word(2, w.y, b.y), word(4, w.z, b.z), word(6, w.w, b.w)};
  }

 private:
  static_assert(WARPS % 4 == 0);

  // The sum over the four lanes that have a row, to all of them.
  static __device__ float2 of_row(float2 sum) {
#pragma unroll
    for (int lane = 1; lane < 4; lane *= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, lane);
      sum.y += __shfl_xor_sync(0xffffffffu, sum.y, lane);
    }
    return sum;
  }
  // What is behind the last column is zero, and stays so.
  __device__ void load_parameters(int i, int slices) {
    const int k = slices * kSlice;
    weight_ahead_[i] = load_vector(weight_ + k, k < left_);
    bias_ahead_[i] = load_vector(bias_ + k, k < left_);
  }
  // Past the L1 cache: a kernel that may still have run when this one began has written it.
  __device__ void load_x(int i, int slices) {
    const int k = slices * kSlice;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int e = 0; e < 8; e += 4) {
        float4 v = {0, 0, 0, 0};
        if (k < left_) v = __ldcg(reinterpret_cast<const float4*>(x_ + row_[n] + k + e));
        float* const to = x_ahead_[i][n] + e;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
      }
    }
  }

  Shared& shared_;
  int width_, warp_, left_;  // left_: inputs from the lane's first on
  float epsilon_;
  const T *weight_, *bias_;
  const float* x_;
  int row_[NT];  // where it begins
  float mean_[NT], scale_[NT];
  uint4 weight_ahead_[AHEAD], bias_ahead_[AHEAD];
  float x_ahead_[AHEAD][NT][8];
};

}  // namespace tlinformer::cuda::step
