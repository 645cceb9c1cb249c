// A few rows through a LayerNorm that is folded into their product with weight matrices, for
// latency: nothing but products and sums of x follows the wait for the previous kernel.
#pragma once

#include "few_sums.cuh"
#include "folded_row.cuh"

namespace tlinformer::cuda::step {

// Two words, or zeros if not `inside`; as load_vector().
__device__ inline uint2 load_words(const void* from, bool inside) {
  uint2 v = {0, 0};
  asm volatile(
      "{ .reg .pred inside; setp.ne.s32 inside, %3, 0;\n"
      "@inside ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2]; }"
      : "+r"(v.x), "+r"(v.y)
      : "l"(from), "r"(int{inside}));
  return v;
}

// W (z w + b), where z = (x - mean) / deviation, is a sum of products of W with x w, with w and
// with b. The latter two do not change within a token: they are found before the wait.
//
// A block has a tile of 16 outputs of each matrix for at most 8 rows; a warp every WARPS-th slice
// of 32 inputs, AHEAD of them in registers. Of a slice lane 4 g + q takes inputs 4 q ... 4 q + 3
// and the same behind another 16, so that the float32 of its neighbours lie beside its own: L2
// gives out no sector twice. It has those of row g and of outputs g and g + 8. Rows of mma's A are
// x w in T and, in its lower half, what T lost of it, so that a large mean, which is subtracted
// later, costs no precision; columns of B are outputs. WHOLE: all slices are in registers at once.
template <class T, int MATRICES, int WARPS, int AHEAD, bool WHOLE>
class FoldedRows {
  using Rows = BlockRows<WARPS, MATRICES>;

 public:
  struct Shared {
    typename Rows::Shared rows;
    float4 fixed[WARPS][MATRICES * kTile / 2];  // two neighbours with w, with b
  };

  // Starts to fetch the weights and the parameters.
  __device__ FoldedRows(Shared& shared, const void* const (&matrices)[MATRICES], int outputs,
                        const Norm& norm, int width)
      : shared_(shared),
        rows_(shared.rows),
        width_(width),
        left_(width - k_),
        epsilon_(norm.epsilon) {
    weight_ = static_cast<const T*>(norm.weight) + k_;
    bias_ = static_cast<const T*>(norm.bias) + k_;
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Outputs past the end repeat the last one; nobody stores them.
        const int output = min(static_cast<int>(blockIdx.x) * kTile + g_ + 8 * half, outputs - 1);
        from_[m][half] = static_cast<const T*>(matrices[m]) + int64_t{output} * width + k_;
      }
    }
    load_constants(0);
  }

  // A warp finishes the row of its number, a lane output() and the next; four lanes have the same.
  __device__ int row() const { return warp_; }
  __device__ static int output() { return Rows::output(); }

  // What can be found before the wait. To be called in a branch: what is in one block of code with
  // the wait, the assembler moves behind it. x: `rows` rows, the last of which is repeated.
  __device__ void prepare(const float* x, int rows) {
    x_ = x + min(g_, rows - 1) * width_ + k_;
    rows_.find_places(warp_);
    multiply_constants(true);
    if constexpr (WHOLE) {
      __syncthreads();
      get_constants();
    }
  }

  __device__ void start() { load_x(0); }
  __device__ void multiply() {
#pragma unroll 1
    for (int slices = 0;;) {
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) multiply_x(i);
      if (WHOLE) break;
      slices += AHEAD * WARPS;
      if ((slices + warp_) * kSlice >= width_) break;
      load_constants(slices);
      load_x(slices);
      multiply_constants(false);
    }
    put();
    __syncthreads();
    if constexpr (!WHOLE) get_constants();
  }

  // Of this lane's outputs.
  __device__ void finish(float per_width, float2 (&values)[MATRICES]) const {
    float2 sums[MATRICES + 1];
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) sums[m] = rows_.get(m);
    sums[MATRICES] = rows_.get_measures();
    Rows::add_groups(sums);
    const NormOf<T> norm(sums[MATRICES], per_width, epsilon_);
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
      const float2 with_weight = fixed_[m][0], with_bias = fixed_[m][1];
      values[m] = {norm.apply(sums[m].x, with_weight.x, with_bias.x),
                   norm.apply(sums[m].y, with_weight.y, with_bias.y)};
    }
  }

 private:
  // What is behind the last column is zero.
  __device__ uint4 load_eight(const T* from, int k) const {
    const uint2 first = load_words(from + k, k < left_);
    const uint2 second = load_words(from + k + kSlice / 2, k + kSlice / 2 < left_);
    return {first.x, first.y, second.x, second.y};
  }
  __device__ void load_constants(int slices) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int k = (slices + i * WARPS) * kSlice;
      weight_words_[i] = load_eight(weight_, k);
      bias_words_[i] = load_eight(bias_, k);
#pragma unroll
      for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) words_[i][m][half] = load_eight(from_[m][half], k);
      }
    }
  }
  __device__ void load_x(int slices) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = (slices + i * WARPS) * kSlice + half * kSlice / 2;
        x_ahead_[i][half] = {0, 0, 0, 0};
        load_now(x_ + k, k < left_, x_ahead_[i][half]);
      }
    }
  }

  // Adds the products of slice i with rows g and g + 8 of A.
  __device__ void multiply(int i, uint4 upper, uint4 lower, float (&sums)[MATRICES][2][4]) const {
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 b = words_[i][m][half];
        mma<T>(sums[m][half], {upper.x, lower.x, upper.y, lower.y}, b.x, b.y);
        mma<T>(sums[m][half], {upper.z, lower.z, upper.w, lower.w}, b.z, b.w);
      }
    }
  }
  __device__ void multiply_constants(bool first) {
    float sums[MATRICES][2][4] = {};
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const uint4 weight = weight_words_[i];
      multiply(i, weight, bias_words_[i], sums);
      weights_[i][0] = unpack<T>(weight.x);
      weights_[i][1] = unpack<T>(weight.y);
      weights_[i][2] = unpack<T>(weight.z);
      weights_[i][3] = unpack<T>(weight.w);
    }
    if (g_ == 0) {  // all have the same
#pragma unroll
      for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* const own = sums[m][half];
          float4& to = shared_.fixed[warp_][(m * kTile + 8 * half) / 2 + q_];
          const float4 before = first ? float4{0, 0, 0, 0} : to;
          to = {before.x + own[0], before.y + own[1], before.z + own[2], before.w + own[3]};
        }
      }
    }
    __syncwarp();
  }
  __device__ void get_constants() {
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
      fixed_[m][0] = fixed_[m][1] = {0, 0};
#pragma unroll
      for (int w = 0; w < WARPS; w += 4) {
        const float4 part = shared_.fixed[Rows::group() + w][(m * kTile + output()) / 2];
        fixed_[m][0] = {fixed_[m][0].x + part.x, fixed_[m][0].y + part.y};
        fixed_[m][1] = {fixed_[m][1].x + part.z, fixed_[m][1].y + part.w};
      }
      Rows::add_groups(fixed_[m]);
    }
  }

  __device__ void multiply_x(int i) {
    const auto word = [&](float2 weight, float x, float y, uint32_t& rest) {
      const float2 product = {kShrink<T> * x * weight.x, kShrink<T> * y * weight.y};
      const uint32_t own = pack<T>(product.x, product.y);
      const float2 kept = unpack<T>(own);
      rest = pack<T>(product.x - kept.x, product.y - kept.y);
      measures_.x += x + y;
      measures_.y += x * x;
      measures_.y += y * y;
      return own;
    };
    const float2* const w = weights_[i];
    const float4 a = x_ahead_[i][0], b = x_ahead_[i][1];
    uint4 upper, lower;
    upper.x = word(w[0], a.x, a.y, lower.x);
    upper.y = word(w[1], a.z, a.w, lower.y);
    upper.z = word(w[2], b.x, b.y, lower.z);
    upper.w = word(w[3], b.z, b.w, lower.w);
    multiply(i, upper, lower, sums_);
  }
  __device__ void put() {
#pragma unroll
    for (int other = 1; other < 4; other *= 2) {
      measures_.x += __shfl_xor_sync(0xffffffffu, measures_.x, other);
      measures_.y += __shfl_xor_sync(0xffffffffu, measures_.y, other);
    }
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* const own = sums_[m][half];
        rows_.put(m * kTile + 8 * half, {own[0] + own[2], own[1] + own[3]});
      }
    }
    if (q_ == 0) rows_.put(Rows::kMeasures, measures_);
  }

  const int warp_ = warp_index(), g_ = threadIdx.x % 32 / 4, q_ = threadIdx.x % 4;
  const int k_ = warp_ * kSlice + 4 * q_;  // the lane's first input
  Shared& shared_;
  Rows rows_;
  int width_, left_;  // left_: inputs from the lane's first on
  float epsilon_;
  const float* x_ = nullptr;
  const T *weight_, *bias_, *from_[MATRICES][2];
  uint4 weight_words_[AHEAD], bias_words_[AHEAD], words_[AHEAD][MATRICES][2];
  float2 weights_[AHEAD][4] = {};
  float4 x_ahead_[AHEAD][2];
  float2 measures_ = {0, 0};  // sums of x and of its squares
  float sums_[MATRICES][2][4] = {};
  float2 fixed_[MATRICES][2] = {};  // of two outputs with w, with b
};

}  // namespace tlinformer::cuda::step
