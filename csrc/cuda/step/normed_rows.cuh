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
  struct Shared {  // of each warp's inputs: the mean, and the sum of squared differences from it
    float2 measures[WARPS][8 * NT];
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

  // Finds the mean and the deviation of each row, in one pass: from the sums of differences from a
  // warp's first value, and of their squares, and from the warps' means. No value is asked for
  // twice: many blocks want the same few words, which the L2 cache gives out one after the other.
  // A value is within sqrt(n) standard deviations of the mean of n: the cancellation in a warp's
  // sum of squares costs at most a factor of n in precision.
  __device__ void measure() {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    float first[NT] = {};
    float2 sum[NT] = {};
    bool begun = false;  // what is past the end comes first
    const int stride = AHEAD * WARPS;
#pragma unroll 1
    for (int chunk = (ceil_div(width_, kSlice) - 1) / stride * stride; chunk >= 0;
         chunk -= stride) {
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) load_x(i, chunk + i * WARPS);
      if (!begun) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          first[n] = __shfl_sync(0xffffffffu, x_ahead_[0][n][0], lane - q);
        }
        begun = (chunk + warp_) * kSlice < width_;
      }
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
    const float inverse = __fdividef(1.0f, fmaxf(inputs_of(warp_), 1.0f));
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float all = of_row(sum[n].x), squares = of_row(sum[n].y), shifted = all * inverse;
      if (q == 0)
        shared_.measures[warp_][8 * n + g] = {first[n] + shifted, squares - all * shifted};
    }
    __syncthreads();
    const float inverse_width = __fdividef(1.0f, width_);
    constexpr int kOwn = ceil_div(WARPS, 4);  // warps of which a lane brings the measures together
    float count[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) count[i] = is_warp(4 * i + q) ? inputs_of(4 * i + q) : 0.0f;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float2 part[kOwn];
      float weighted = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        part[i] = {0, 0};
        if (is_warp(4 * i + q)) part[i] = shared_.measures[4 * i + q][8 * n + g];
        weighted += count[i] * part[i].x;
      }
      mean_[n] = of_row(weighted) * inverse_width;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float difference = part[i].x - mean_[n];
        squares += part[i].y + count[i] * difference * difference;
      }
      scale_[n] = rsqrtf(of_row(squares) * inverse_width + epsilon_);
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
  static __device__ bool is_warp(int warp) { return WARPS % 4 == 0 || warp < WARPS; }
  // The sum over the four lanes that have a row, to all of them.
  static __device__ float of_row(float sum) {
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
  }
  // Of a row, how many a warp has.
  __device__ float inputs_of(int warp) const {
    const int slices = ceil_div(width_, kSlice), last = slices - 1;
    const int past = last % WARPS == warp ? slices * kSlice - width_ : 0;
    return static_cast<float>((slices - warp + WARPS - 1) / WARPS * kSlice - past);
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
