// Sums of products of a few rows with a tile of weights, on tensor cores.
#pragma once

#include "weight_stream.cuh"

namespace tlinformer::cuda::step {

constexpr int kFewRows = 8;

// Of 8 rows with 16 outputs. Rows are A, outputs columns of B, and the words of a load operands as
// they lie, if those of the one are in other_order(): row g of A has words x and z of a lane's
// row, row g + 8 words y and w (or, where that is in the other order, x and y, and z and w), and
// either meets those of the outputs in a product of its own, whose other half counts for nothing.
struct FewSums {
  float upper[2][4] = {}, lower[2][4] = {};

  template <class T>
  __device__ void add(uint4 low, uint4 high, uint4 row) {
    const uint32_t rows[4] = {row.x, row.y, row.z, row.w};
    mma<T>(upper[0], rows, low.x, low.y);
    mma<T>(upper[1], rows, high.x, high.y);
    mma<T>(lower[0], rows, low.z, low.w);
    mma<T>(lower[1], rows, high.z, high.w);
  }
  // Of row g and outputs 8 half + 2 q and the next.
  __device__ float2 at(int half) const {
    return {upper[half][0] + lower[half][2], upper[half][1] + lower[half][3]};
  }
};
__device__ inline uint4 other_order(uint4 words) { return {words.x, words.z, words.y, words.w}; }

// Sums of 8 rows, brought together in shared memory: each warp has a part of those of 16 outputs of
// each matrix, and of two measures more. In the end the warp of a row's number adds up the parts of
// that row: a lane has output() and the next, and four lanes the same.
template <int WARPS, int MATRICES>
class BlockRows {
  // Of both pitches the lanes of a store and of a load are in different banks.
  static constexpr int kRow = MATRICES * kTile + 8, kWarp = kFewRows * kRow + 16;
  static_assert(WARPS % 4 == 0 && WARPS >= kFewRows);

 public:
  static constexpr int kMeasures = MATRICES * kTile;  // their column, behind the outputs
  struct Shared {
    float sums[WARPS][kWarp];
  };

  __device__ explicit BlockRows(Shared& shared) : sums_(&shared.sums[0][0]) {}
  __device__ static int output() { return threadIdx.x % 8 * 2; }
  // The warps whose parts a lane adds up itself are this one and every fourth.
  __device__ static int group() { return threadIdx.x % 32 / 8; }

  // Of nothing that the wait is for.
  __device__ void find_places(int warp) {
    const int lane = threadIdx.x % 32;
    put_ = warp * kWarp + lane / 4 * kRow + lane % 4 * 2;
    get_measures_ = group() * kWarp + warp * kRow + kMeasures;
    get_ = get_measures_ - kMeasures + output();
  }
  // Of row g, two columns 2 q behind this one; measures are those of q = 0.
  __device__ void put(int column, float2 pair) {
    *reinterpret_cast<float2*>(sums_ + put_ + column) = pair;
  }
  // Of matrix m, to be added over groups.
  __device__ float2 get(int m) const { return of_group(get_ + m * kTile); }
  __device__ float2 get_measures() const { return of_group(get_measures_); }

  template <int COUNT>
  __device__ static void add_groups(float2 (&sums)[COUNT]) {
#pragma unroll
    for (int other = 8; other < 32; other *= 2) {
#pragma unroll
      for (float2& sum : sums) {
        sum.x += __shfl_xor_sync(0xffffffffu, sum.x, other);
        sum.y += __shfl_xor_sync(0xffffffffu, sum.y, other);
      }
    }
  }

 private:
  __device__ float2 of_group(int place) const {
    float2 sum = *reinterpret_cast<const float2*>(sums_ + place);
#pragma unroll
    for (int w = 4; w < WARPS; w += 4) {
      const float2 part = *reinterpret_cast<const float2*>(sums_ + place + w * kWarp);
      sum = {sum.x + part.x, sum.y + part.y};
    }
    return sum;
  }

  float* sums_;
  int put_ = 0, get_ = 0, get_measures_ = 0;
};

// Past the L1 cache: a kernel that may still have run when this one began has written it.
template <class Vector>
__device__ void load_now(const void* from, bool inside, Vector& to) {
  auto& words = reinterpret_cast<uint4&>(to);
  asm volatile(
      "{ .reg .pred inside; setp.ne.s32 inside, %5, 0;\n"
      "@inside ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4]; }"
      : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)
      : "l"(from), "r"(int{inside}));
}

}  // namespace tlinformer::cuda::step
