// LayerNorm of a token's rows, as an operand of products: each warp normalises its own slices,
// in registers, and all of a block share what they find of the rows' means and deviations.
#pragma once

#include "folded_row.cuh"

namespace tlinformer::cuda::step {

// At most 8 NT rows of float32. Of every row a lane has the inputs that WeightStream says, of
// slices warp, warp + WARPS ...; AHEAD of them are in registers at once. at() takes slices in the
// order that WeightStream::multiply() does.
template <class T, int NT, int WARPS, int AHEAD>
class NormedRows {
 public:
  struct Shared {
    float2 measures[WARPS][8 * NT];  // sums of each warp's inputs, and of their squares
  };

  // Starts to fetch the parameters, which do not change within a token.
  __device__ NormedRows(Shared& shared, const Norm& norm, const float* x, int rows, int width)
      : shared_(shared), width_(width), warp_(warp_index()), epsilon_(norm.epsilon) {
    const int g = threadIdx.x % 32 / 4, own = warp_ * kSlice + threadIdx.x % 4 * 8;
    weight_ = static_cast<const T*>(norm.weight) + own;
    bias_ = static_cast<const T*>(norm.bias) + own;
    left_ = width - own;
#pragma unroll
    for (int n = 0; n < NT; ++n) x_[n] = x + own + min(8 * n + g, rows - 1) * width;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) load_parameters(i, i * WARPS);
  }

  // Finds the mean and the deviation of each row, in one pass, as NormOf does for a single one. No
  // value is asked for twice: many blocks want the same few words, which the L2 cache gives out one
  // after the other.
  __device__ void measure() {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    const float per_width = __fdividef(1.0f, width_);
    float2 sums[NT] = {};
    const int stride = AHEAD * WARPS;
#pragma unroll 1
    for (int chunk = (ceil_div(width_, kSlice) - 1) / stride * stride; chunk >= 0;
         chunk -= stride) {
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) load_x(i, chunk + i * WARPS);
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
          for (const float x : x_ahead_[i][n]) {
            sums[n].x += x;
            sums[n].y += x * x;
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float2 own = of_row(sums[n]);
      if (q == 0) shared_.measures[warp_][8 * n + g] = own;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float2 all = {0, 0};
#pragma unroll
      for (int first = 0; first < WARPS; first += 4) {
        const float2 part = first + q < WARPS ? shared_.measures[first + q][8 * n + g] : float2{};
        all = {all.x + part.x, all.y + part.y};
      }
      const NormOf<T> norm(of_row(all), per_width, epsilon_);
      scale_[n] = norm.scale;
      shift_[n] = -norm.mean * norm.scale;
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
      return pack<T>((x[e] * scale_[n] + shift_[n]) * w.x + b.x,
                     (x[e + 1] * scale_[n] + shift_[n]) * w.y + b.y);
    };
    const uint4 w = weight_ahead_[i], b = bias_ahead_[i];
    return {word(0, w.x, b.x), word(2, w.y, b.y), word(4, w.z, b.z), word(6, w.w, b.w)};
  }

 private:
  // The sums over the four lanes that have a row, to all of them.
  static __device__ float2 of_row(float2 sums) {
#pragma unroll
    for (int other = 1; other < 4; other *= 2) {
      sums.x += __shfl_xor_sync(0xffffffffu, sums.x, other);
      sums.y += __shfl_xor_sync(0xffffffffu, sums.y, other);
    }
    return sums;
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
        if (k < left_) v = __ldcg(reinterpret_cast<const float4*>(x_[n] + k + e));
        float* const to = x_ahead_[i][n] + e;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
      }
    }
  }

  Shared& shared_;
  int width_, warp_, left_;  // left_: inputs from the lane's first on
  float epsilon_;
  const T *weight_, *bias_;
  const float* x_[NT];
  float scale_[NT], shift_[NT];  // of x, to the normed one
  uint4 weight_ahead_[AHEAD], bias_ahead_[AHEAD];
  float x_ahead_[AHEAD][NT][8];
};

}  // namespace tlinformer::cuda::step
