// Products of the backward pass. A warp holds rows of two matrices in registers (queries and the
// gradient of their outputs, or keys and values), and 16 rows of the two others lie in shared
// memory.
#pragma once

#include "ranged_tiles.cuh"

namespace tlinformer::cuda {

// Sets of 16 rows of a warp. Two halve the reads of shared memory, where registers suffice.
constexpr int query_sets(int d) { return d <= 64 ? 2 : 1; }
constexpr int key_sets(int d) { return d <= 48 ? 2 : 1; }

// Two 8 x 8 matrices; lane i < 16 names row i % 8 of matrix i / 8.
template <bool transposed>
__device__ inline void load_two_matrices(uint32_t (&b)[2], uint32_t row) {
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(b[0]), "=r"(b[1])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(b[0]), "=r"(b[1])
                 : "r"(row)
                 : "memory");
  }
}

// Rows of a warp. A lane holds rows 16 r + 8 h + g (g = lane / 4), and of a product with 16 rows
// of shared memory the columns 8 n + 2 t and the next (t = lane % 4).
template <class T, int d, int kSets>
struct HeldRows {
  static constexpr int kChunks = PrefillTile<d>::kChunks;
  static constexpr int kRowBytes = RangedTile<d>::kRowBytes;
  using Scores = float[kSets][2][4];   // [r][n][2 h + column % 2]
  using Weights = uint32_t[kSets][4];  // the same, as an operand
  using Sums = float[kSets][kChunks][4];

  uint32_t operand[kSets][(kChunks + 1) / 2][4];

  // Calls f(r, h, row) for the lane's rows.
  template <class F>
  static __device__ void each_row(const F& f) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int r = 0; r < kSets; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) f(r, h, 16 * r + 8 * h + g);
    }
  }

  // Rows begin ... end - 1 from `from` on; the others become 0. also(r, h, offset, word) sees each.
  template <class F>
  __device__ void load(const T* from, int64_t stride, int begin, int end, const F& also) {
    each_row([&](int r, int h, int row) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int column = 8 * c + threadIdx.x % 4 * 2;
        uint32_t word = 0;
        if (row >= begin && row < end && (d % 8 == 0 || column < d)) {
          word = *reinterpret_cast<const uint32_t*>(from + row * stride + column);
          also(r, h, row, column, word);
        }
        operand[r][c / 2][c % 2 * 2 + h] = word;
      }
      if (kChunks % 2 != 0) operand[r][kChunks / 2][2 + h] = 0;
    });
  }
  __device__ void load(const T* from, int64_t stride, int end) {
    load(from, stride, 0, end, [](int, int, int, int, uint32_t) {});
  }

  // This times the transposed 16 rows at a shared address.
  __device__ void product(Scores& score, uint32_t rows) const {
    const int lane = threadIdx.x % 32;
    const uint32_t pairs = rows + (lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int r = 0; r < kSets; ++r)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[r][n][i] = 0;
#pragma unroll
    for (int c = 0; c + 1 < kChunks; c += 2) {
      uint32_t b[4];
      load_matrices<false>(b, pairs + 16 * c);
#pragma unroll
      for (int r = 0; r < kSets; ++r) {
        mma<T>(score[r][0], operand[r][c / 2], b[0], b[1]);
        mma<T>(score[r][1], operand[r][c / 2], b[2], b[3]);
      }
    }
    if constexpr (kChunks % 2 != 0) {
      uint32_t b[2];
      load_two_matrices<false>(b, rows + lane % 16 * kRowBytes + 16 * (kChunks - 1));
#pragma unroll
      for (int r = 0; r < kSets; ++r) {
        const auto& a = operand[r][kChunks / 2];
        mma_k8<T>(score[r][0], a[0], a[1], b[0]);
        mma_k8<T>(score[r][1], a[0], a[1], b[1]);
      }
    }
  }

  // sums += weights times the 16 rows at a shared address.
  static __device__ void add_product(Sums& sums, const Weights& weights, uint32_t rows) {
    const int lane = threadIdx.x % 32;
    const uint32_t row = rows + lane % 16 * kRowBytes;
#pragma unroll
    for (int c = 0; c + 1 < kChunks; c += 2) {
      uint32_t b[4];
      load_matrices<true>(b, row + lane / 16 * 16 + 16 * c);
#pragma unroll
      for (int r = 0; r < kSets; ++r) {
        mma<T>(sums[r][c], weights[r], b[0], b[1]);
        mma<T>(sums[r][c + 1], weights[r], b[2], b[3]);
      }
    }
    if constexpr (kChunks % 2 != 0) {
      uint32_t b[2];
      load_two_matrices<true>(b, row + 16 * (kChunks - 1));
#pragma unroll
      for (int r = 0; r < kSets; ++r) mma<T>(sums[r][kChunks - 1], weights[r], b[0], b[1]);
    }
  }

  static __device__ void pack_weights(Weights& weights, const Scores& x) {
#pragma unroll
    for (int r = 0; r < kSets; ++r)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          weights[r][2 * n + h] = pack<T>(x[r][n][2 * h], x[r][n][2 * h + 1]);
  }

  // Writes `scale` times the sums to the rows below `end` from `to` on.
  static __device__ void write(const Sums& sums, float scale, T* to, int64_t stride, int end) {
    each_row([&](int r, int h, int row) {
      if (row >= end) return;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int column = 8 * c + threadIdx.x % 4 * 2;
        if (d % 8 == 0 || column < d) {
          *reinterpret_cast<uint32_t*>(to + row * stride + column) =
              pack<T>(scale * sums[r][c][2 * h], scale * sums[r][c][2 * h + 1]);
        }
      }
    });
  }
};

void launch_grad_queries(const RangedPlan& plan, const Launch& how);
void launch_grad_keys(const RangedPlan& plan, const Launch& how);

}  // namespace tlinformer::cuda
