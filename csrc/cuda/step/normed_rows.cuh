// LayerNorm of the rows of a token, into shared memory as the B operand of products.
#pragma once

#include "product.h"
#include "weight_stream.cuh"

namespace tlinformer::cuda::step {

constexpr int kWarps = 8;  // of a block with normed rows

// 16 bytes from global into shared memory, while the thread goes on.
__device__ inline void copy_async(void* to, const void* from) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

// For at most ROWS rows, which is 1 (all warps share it) or a multiple of 8 (each warp has its
// own). Between measure() and normalise() the block may do something else.
template <class T, int ROWS>
class NormedRows {
 public:
  static constexpr int NT = ceil_div(ROWS, 8);

  // An odd number of slices: the rows of a fragment then lie in different banks.
  __host__ __device__ static int stride(int width) {
    return (ceil_div(width, kSlice) | 1) * kSlice;
  }
  static size_t bytes(int rows, int width) {
    return sizeof(T) * (static_cast<size_t>(rows) * stride(width) + 2 * width) +
           sizeof(float2) * kWarps;
  }

  // Starts to fetch the parameters, which do not change within a token.
  __device__ NormedRows(void* shared, const Norm& norm, const float* x, int rows, int width)
      : x_(x),
        rows_(ROWS == 1 ? 1 : rows),
        width_(width),
        warp_(warp_index()),
        epsilon_(norm.epsilon) {
    normed_ = static_cast<T*>(shared);
    weight_ = normed_ + rows_ * stride(width);
    bias_ = weight_ + width;
    measures_ = reinterpret_cast<float2*>(bias_ + width);
#pragma unroll 1
    for (int c = 8 * threadIdx.x; c < width; c += 8 * 32 * kWarps) {
      copy_async(weight_ + c, static_cast<const T*>(norm.weight) + c);
      copy_async(bias_ + c, static_cast<const T*>(norm.bias) + c);
    }
  }

  // Finds the mean and the variance of each row from the sums of its differences from its first
  // value, and of their squares: one pass. Any value of a row is within sqrt(width) standard
  // deviations of the mean: the cancellation in the variance costs at most a factor of width in
  // precision.
  __device__ void measure() {
    constexpr int kAtOnce = ROWS == 8 ? 4 : 1;  // to have several loads under way
    float2 sum[NT];
#pragma unroll
    for (int i = 0; i < NT; ++i) {
      sum[i] = {0, 0};
      // Volatile, so that volatile loads in front of measure() stay there.
      first_[i] = *static_cast<const volatile float*>(x_ + row(i) * width_);
    }
#pragma unroll 1
    for (int c = column(); c < width_; c += kAtOnce * kStep) {
      float4 v[kAtOnce][NT];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int i = 0; i < NT; ++i) {
          v[j][i] = {0, 0, 0, 0};
          if (c + j * kStep < width_) v[j][i] = load(i, c + j * kStep);
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int i = 0; i < NT; ++i) {
          for (const float x : {v[j][i].x, v[j][i].y, v[j][i].z, v[j][i].w}) {
            const float difference = c + j * kStep < width_ ? x - first_[i] : 0.0f;
            sum[i].x += difference;
            sum[i].y += difference * difference;
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < NT; ++i) sum_[i] = {warp_sum(sum[i].x), warp_sum(sum[i].y)};
    if (ROWS == 1 && threadIdx.x % 32 == 0) measures_[threadIdx.x / 32] = sum_[0];
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
  }

  __device__ void normalise() {
    if constexpr (ROWS == 1) {
      sum_[0] = {0, 0};
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        sum_[0].x += measures_[warp].x;
        sum_[0].y += measures_[warp].y;
      }
    }
    float mean[NT], scale[NT];
#pragma unroll
    for (int i = 0; i < NT; ++i) {
      const float shifted = __fdividef(sum_[i].x, width_);
      mean[i] = first_[i] + shifted;
      scale[i] = rsqrtf(__fdividef(sum_[i].y, width_) - shifted * shifted + epsilon_);
    }
#pragma unroll 1
    for (int c = column(); c < ceil_div(width_, kSlice) * kSlice; c += kStep) {
      const bool inside = c < width_;  // what pads the last slice is zero
      uint2 w = {0, 0}, b = {0, 0};
      if (inside) {
        w = *reinterpret_cast<const uint2*>(weight_ + c);
        b = *reinterpret_cast<const uint2*>(bias_ + c);
      }
      const float2 w0 = unpack<T>(w.x), w1 = unpack<T>(w.y);
      const float2 b0 = unpack<T>(b.x), b1 = unpack<T>(b.y);
#pragma unroll
      for (int i = 0; i < NT; ++i) {
        uint2 normed = {0, 0};
        if (inside) {
          const float4 v = load(i, c);
          const float m = mean[i], s = scale[i];
          normed.x = pack<T>((v.x - m) * s * w0.x + b0.x, (v.y - m) * s * w0.y + b0.y);
          normed.y = pack<T>((v.z - m) * s * w1.x + b1.x, (v.w - m) * s * w1.y + b1.y);
        }
        if (has(i)) *reinterpret_cast<uint2*>(normed_ + row(i) * stride(width_) + c) = normed;
      }
    }
    __syncthreads();
  }

  // For WeightStream::multiply(). Rows past the last repeat it; nobody stores their results.
  struct Inputs {
    const T* row[NT];
    __device__ void load(int, int) {}
    __device__ uint4 at(int, int slice, int n) const {
      return *reinterpret_cast<const uint4*>(row[n] + slice * kSlice);
    }
  };
  __device__ Inputs inputs() const {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    Inputs inputs;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      inputs.row[n] = normed_ + min(8 * n + g, rows_ - 1) * stride(width_) + 8 * q;
    }
    return inputs;
  }

 private:
  static constexpr int kStep = ROWS == 1 ? 4 * 32 * kWarps : 4 * 32;

  // The rows and the first columns of this thread.
  __device__ bool has(int i) const { return ROWS == 1 || warp_ + i * kWarps < rows_; }
  __device__ int row(int i) const { return ROWS == 1 ? 0 : min(warp_ + i * kWarps, rows_ - 1); }
  __device__ int column() const { return 4 * (ROWS == 1 ? threadIdx.x : threadIdx.x % 32); }
  __device__ float4 load(int i, int c) const {
    return *reinterpret_cast<const float4*>(x_ + row(i) * width_ + c);
  }

  const float* x_;
  int rows_, width_, warp_;
  float epsilon_;
  T *normed_, *weight_, *bias_;
  float2* measures_;
  float first_[NT];  // value of each row
  float2 sum_[NT];
};

}  // namespace tlinformer::cuda::step
