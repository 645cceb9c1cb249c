// What the kernels of ranged attention share: the plan, and rows of two matrices streaming through
// shared memory, 64 at a time, past warps that hold other rows in registers.
#pragma once

#include "prefill_attention.cuh"
#include "ranged_attention.h"

namespace tlinformer::cuda {

// A call, ready for the device.
struct RangedPlan {
  RangedAttention call;
  RangedGradient gradient;
  int queries_per_key;  // heads
  float factor;         // from products to scores to base 2; > 0 in the forward pass
  uint32_t sign;        // flips the queries there
  uint32_t threshold;   // of dropout's bits; 0: none
  float kept_scale;     // of the probabilities that are kept
  Segment segments[kMostSegments];
};

constexpr int kRangedThreads = 128;

template <class T>
__device__ inline T* rows_of(const HeadTensor& x, int batch, int head, int64_t row) {
  return static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride +
         row * x.row_stride;
}

// `count` rows of two matrices from `row` on, as what TileCopy takes.
template <class T>
__device__ inline KeyGroup range_of(const HeadTensor& first, const HeadTensor& second, int row,
                                    int count) {
  KeyGroup range;
  range.keys = first;
  range.values = second;
  range.keys.data = static_cast<T*>(first.data) + row * first.row_stride;
  range.values.data = static_cast<T*>(second.data) + row * second.row_stride;
  range.count = count;
  return range;
}

// A stage holds 64 rows of both matrices, then up to three words a row.
template <int d>
struct RangedTile {
  static constexpr int kStages = d > 96 ? 2 : 3;
  static constexpr int kTable = 2 * kKeyTile * PrefillTile<d>::kStride * 2;
  static constexpr int kColumn = kKeyTile * 4;
  static constexpr int kStageBytes = kTable + 3 * kColumn;
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kRowBytes = PrefillTile<d>::kStride * 2;
};

__device__ inline void store_word(uint32_t shared, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(x) : "memory");
}

// Zeroes what lies behind the rows' d columns, which copies never touch and products read.
template <class T, int d>
__device__ inline void clear_padding(uint32_t stages) {
  constexpr int kWords = (PrefillTile<d>::kChunks * 8 - d) / 2;
  if constexpr (kWords > 0) {
    using Tile = RangedTile<d>;
    for (int i = threadIdx.x; i < Tile::kStages * 2 * kKeyTile; i += kRangedThreads) {
      const uint32_t row = stages + i / (2 * kKeyTile) * Tile::kStageBytes +
                           i % (2 * kKeyTile) * Tile::kRowBytes + d * sizeof(T);
#pragma unroll
      for (int j = 0; j < kWords; ++j) store_word(row + 4 * j, 0);
    }
  }
}

// Calls f(stage's shared address, first row) for every 64 rows of the range from tile `first` on.
// table(address of the stage's words, first row), by all threads, fills in what goes with them.
template <class T, int d, class Table, class F>
__device__ inline void stream(const KeyGroup& range, int batch, int head, int first,
                              uint32_t stages, const Table& table, const F& f) {
  using Tile = RangedTile<d>;
  constexpr int kStages = Tile::kStages;
  TileCopy<T, d, kRangedThreads, kKeyTile> copy(range, batch, head, first);
  const int count = static_cast<int>(range.count);
  int next = first * kKeyTile;
  const auto start = [&](int stage) {
    const uint32_t to = stages + stage * Tile::kStageBytes;
    if (next < count) {
      copy.start(range, to, count - next);
      table(to + Tile::kTable, next);
    }
    next += kKeyTile;
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  __syncthreads();  // all have read what was streamed before
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) start(i);
#pragma unroll 1
  for (int at = first * kKeyTile, stage = 0; at < count; at += kKeyTile) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();  // all of this tile has arrived, and all have read the one before
    start(stage == 0 ? kStages - 1 : stage - 1);
    f(stages + stage * Tile::kStageBytes, at);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
}

// A table of dropout's bits for 64 keys.
struct KeyBits {
  bool on;
  DropoutBits bits;
  int first_key;
  __device__ void operator()(uint32_t to, int row) const {
    if (on && threadIdx.x < kKeyTile) {
      store_word(to + 4 * threadIdx.x, bits.of_key(first_key + row + threadIdx.x));
    }
  }
};

__device__ inline DropoutBits dropout_bits(const RangedPlan& p, int batch, int head) {
  static const int64_t unused = 0;
  return {p.threshold > 0 ? p.call.seed : &unused, int64_t{batch} * p.call.query_heads + head};
}

// Fills in the plan but for the segments' bounds, which it checks. Throws InvalidArgument.
RangedPlan make_plan(const RangedAttention& a);

}  // namespace tlinformer::cuda
