// One row against weight matrices, on tensor cores, for latency: what follows the wait for the
// previous kernel is kept short, in instructions, each of which is about six cycles of the token.
#pragma once

#include "../warp_state.cuh"
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

// A value that is found here, not behind the next branch, where it is used.
__device__ inline uint32_t keep(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
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

  // `inputs` has started, too. ONE_PASS: all slices are in flight.
  template <bool ONE_PASS = false, class Inputs>
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
      if (ONE_PASS) break;
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

}  // namespace tlinformer::cuda::step
