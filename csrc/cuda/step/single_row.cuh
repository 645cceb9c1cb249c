// One row against weight matrices, on tensor cores, for latency: what follows the wait for the
// previous kernel is kept short, in instructions, each of which is about six cycles of the token.
#pragma once

#include <type_traits>

#include "product.h"
#include "weight_stream.cuh"

namespace tlinformer::cuda::step {

// A block has a tile of 16 outputs, a warp every WARPS-th slice of 32 inputs. Lane 4 g + q loads
// the inputs 8 q ... 8 q + 7 of outputs g and g + 8: four words each, which are an A operand as
// they lie. mma then multiplies words 0 and 2 in its row g and words 1 and 3 in its row g + 8:
// columns 0 ... 3 of B have the inputs of the former, columns 4 ... 7 those of the latter, and the
// sum of column c in row g and of column c + 4 in row g + 8 is the product with vector c.
constexpr int kVectors = 4;

// What a lane holds of B: of its eight inputs of one of the vectors, words part and part + 2.
struct LaneOfB {
  int warp = warp_index();
  int vector = threadIdx.x % 16 / 4;
  int element = warp * kSlice + threadIdx.x % 4 * 8 + threadIdx.x % 32 / 16 * 2;
};
constexpr int kOtherWord = 4;  // elements from one word to the other

__device__ inline uint32_t load_word(const void* from, bool inside) {
  uint32_t word = 0;
  asm volatile(
      "{ .reg .pred inside; setp.ne.s32 inside, %2, 0;\n"
      "@inside ld.global.L1::no_allocate.u32 %0, [%1]; }"
      : "+r"(word)
      : "l"(from), "r"(int{inside}));
  return word;
}

// The sums of a tile with four vectors, as mma leaves them.
struct RowSums {
  float low[4] = {}, high[4] = {};

  // Words of outputs g and g + 8, and those of the vectors.
  template <class T>
  __device__ void add(uint4 of_low, uint4 of_high, uint2 vectors) {
    mma<T>(low, {of_low.x, of_low.y, of_low.z, of_low.w}, vectors.x, vectors.y);
    mma<T>(high, {of_high.x, of_high.y, of_high.z, of_high.w}, vectors.x, vectors.y);
  }
  // Of own_output(), with vectors 2 (q % 2) and 2 (q % 2) + 1.
  __device__ float2 own() const {
    const bool first = threadIdx.x % 4 < 2;
    const float2 sent = first ? float2{high[0], high[1]} : float2{low[2], low[3]};
    const float2 kept = first ? float2{low[0], low[1]} : float2{high[2], high[3]};
    return {kept.x + __shfl_xor_sync(0xffffffffu, sent.x, 2),
            kept.y + __shfl_xor_sync(0xffffffffu, sent.y, 2)};
  }
  static __device__ int own_output() { return threadIdx.x % 32 / 4 + threadIdx.x % 4 / 2 * 8; }
};

// Multiplies rows that `Inputs` gives: load(i, slices) is called ahead of at(i).
template <class T, int MATRICES, int WARPS, int AHEAD>
class RowWeights {
 public:
  // Starts to fetch the first slices.
  __device__ RowWeights(const void* const (&matrices)[MATRICES], int inputs, int outputs) {
    const int g = threadIdx.x % 32 / 4, k = warp_index() * kSlice + threadIdx.x % 4 * 8;
    left_ = inputs - k;
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Outputs past the end repeat the last one; nobody stores them.
        const int output = min(static_cast<int>(blockIdx.x) * kTile + g + 8 * half, outputs - 1);
        from_[m][half] = static_cast<const T*>(matrices[m]) + int64_t{output} * inputs + k;
      }
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) load(i, i * WARPS);
  }

  // `inputs` has started, too.
  template <class Inputs>
  __device__ void multiply(Inputs& inputs) {
    const int left = __shfl_sync(0xffffffffu, left_, 0);  // of the whole warp
#pragma unroll 1
    for (int slices = 0;;) {
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const uint2 b = inputs.at(i);
#pragma unroll
        for (int m = 0; m < MATRICES; ++m) {
          sums_[m].template add<T>(words_[i][m][0], words_[i][m][1], b);
        }
      }
      slices += AHEAD * WARPS;
      if (slices * kSlice >= left) break;
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        load(i, slices + i * WARPS);
        inputs.load(i, slices + i * WARPS);
      }
    }
  }

  __device__ float2 sum(int m) const { return sums_[m].own(); }

 private:
  __device__ void load(int i, int slices) {
    const int k = slices * kSlice;
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        words_[i][m][half] = load_vector(from_[m][half] + k, k < left_);
      }
    }
  }

  int left_;  // inputs from the lane's first on
  const T* from_[MATRICES][2];
  uint4 words_[AHEAD][MATRICES][2];
  RowSums sums_[MATRICES];
};

// A row of T, slices warp, warp + WARPS ... of it.
template <class T, int WARPS, int AHEAD>
class PlainRow {
 public:
  __device__ PlainRow(const void* row, int width)
      : from_(static_cast<const T*>(row) + lane_.element),
        left_(lane_.vector == 0 ? width - lane_.element : 0) {}
  __device__ void start() {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) load(i, i * WARPS);
  }
  __device__ void load(int i, int slices) {
    const int k = slices * kSlice;
    words_[i] = {0, 0};
    if (k < left_) {
      words_[i] = {__ldcg(reinterpret_cast<const uint32_t*>(from_ + k)),
                   __ldcg(reinterpret_cast<const uint32_t*>(from_ + k + kOtherWord))};
    }
  }
  __device__ uint2 at(int i) const { return words_[i]; }

 private:
  LaneOfB lane_;
  const T* from_;
  int left_;
  uint2 words_[AHEAD];
};

// Keeps x w of float16 from overflowing; what it then lacks for small values, vector 3 has.
template <class T>
constexpr float kShrink = std::is_same_v<T, f16> ? 1.0f / 64 : 1.0f;

// A row of float32 through a LayerNorm. W (z w + b), where z = (x - mean) / deviation, is a sum of
// products of W with x w, with w and with b. These cost nothing, as mma multiplies eight columns
// anyway, and the mean and the deviation are found meanwhile. Vector 0 is x w in T, vector 3 what T
// lost of it, so that a large mean, which is subtracted later, costs no precision; 1 and 2 are w,
// b.
template <class T, int WARPS, int AHEAD>
class FoldedRow {
 public:
  // Starts to fetch the parameters, which do not change within a token.
  __device__ FoldedRow(const Norm& norm, const float* x, int width)
      : x_(x + lane_.element),
        parameters_(static_cast<const T*>(lane_.vector == 2 ? norm.bias : norm.weight) +
                    lane_.element),
        left_(width - lane_.element),
        has_x_(lane_.vector == 0 || lane_.vector == 3),
        less_(lane_.vector == 3 ? -1.0f : 0.0f) {
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
    return {word(parameter_[i].x, x_ahead_[i][0]), word(parameter_[i].y, x_ahead_[i][1])};
  }

  // The warp's sums of x and of its squares, in lanes 0 ... 3 and 16 ... 19.
  __device__ float2 measures() const {
    float2 sums = sums_;
#pragma unroll
    for (const int other : {1, 2, 16}) {
      sums.x += __shfl_xor_sync(0xffffffffu, sums.x, other);
      sums.y += __shfl_xor_sync(0xffffffffu, sums.y, other);
    }
    return sums;
  }

 private:
  __device__ void load_parameters(int i, int slices) {
    const int k = slices * kSlice;
    parameter_[i] = {load_word(parameters_ + k, k < left_),
                     load_word(parameters_ + k + kOtherWord, k < left_)};
  }
  __device__ void load_x(int i, int slices) {
    const int k = slices * kSlice;
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
  __device__ float apply(float4 sum) const {
    return scale * ((sum.x + sum.w) / kShrink<T> - mean * sum.y) + sum.z;
  }
  // Of the sums that two neighbouring lanes have, to both.
  __device__ float apply(float2 own) const {
    const float part = threadIdx.x % 2 == 0 ? scale * (own.x / kShrink<T> - mean * own.y)
                                            : own.x + scale * (own.y / kShrink<T>);
    return part + __shfl_xor_sync(0xffffffffu, part, 1);
  }
};

}  // namespace tlinformer::cuda::step
