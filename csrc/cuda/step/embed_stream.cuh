// The embedding's rows streamed through shared memory, by copies that begin long before x exists.
#pragma once

#include "../attention/row_copy.cuh"
#include "product.h"
#include "weight_stream.cuh"

namespace tlinformer::cuda::step {

constexpr int kHeadWarps = 6, kStages = 2;  // stages of each warp, which shares them with none
constexpr int kHeadMemory = 220 * 1024;

// In bytes: the stages, of 16 rows' next `columns` columns each, and behind them x as an operand of
// mma, of which each lane has `of_lane` in each slice.
struct Places {
  int columns = 16 * kSlice, pieces, pitch, stage, row, end;

  Places(int width, size_t of_lane) {
    for (;; columns -= kSlice) {
      pitch = columns / kSlice % 2 * -64 + 2 * columns + 64;  // odd times 64: rows lie in all banks
      stage = kTile * pitch;
      row = kHeadWarps * kStages * stage;
      end = row + ceil_div(width, kSlice) * 32 * static_cast<int>(of_lane);
      if (columns == kSlice || (end <= kHeadMemory && columns < width + kSlice)) break;
    }
    pieces = ceil_div(width, columns);
  }
};

// A warp's tiles of 16 tokens.
template <class T>
class EmbedStream {
 public:
  // Starts to fetch.
  __device__ EmbedStream(const HeadStep& p, const Places& places, char* memory,
                         uint64_t (&arrived)[kStages])
      : p_(p), places_(places), arrived_(arrived) {
    if (lane_ == 0) {
      for (uint64_t& barrier : arrived_) prepare_copies(&barrier);
    }
    __syncwarp();
    stages_ = memory + warp_index() * kStages * places.stage;
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) copy(stage);
  }

  // Calls finish(tile, sums) for each tile's products with `operand`, this lane's, whose pieces are
  // 32 apart.
  template <class Sums, class Operand, class Finish>
  __device__ void multiply(const Operand* operand, const Finish& finish) {
    const int width = p_.hidden_size, g = lane_ / 4, q = lane_ % 4;
    int stage = 0, parity = 0;
    const auto turn = [&] {
      stage ^= 1;
      if (stage == 0) parity ^= 1;
    };
    static_assert(kStages == 2);
#pragma unroll 1
    for (int tile = first_; tile < tiles_; tile += step_) {
      Sums sums;
#pragma unroll 1
      for (int piece = 0; piece < places_.pieces; ++piece) {
        const int begin = piece * places_.columns, left = width - begin - 8 * q;
        const char* const from = stages_ + stage * places_.stage + g * places_.pitch + 16 * q;
        await_tile<1>(&arrived_[stage], parity, false);
        const int count = min(places_.columns, width - begin);
#pragma unroll 7
        for (int k = 0; k < count; k += kSlice) {
          const Operand b = operand[begin + k];  // 32 lanes a slice of 32
          uint4 low = {0, 0, 0, 0}, high = low;  // what lies behind the last column may be NaN
          if (k < left) {
            low = *reinterpret_cast<const uint4*>(from + 2 * k);
            high = *reinterpret_cast<const uint4*>(from + 8 * places_.pitch + 2 * k);
          }
          sums.template add<T>(low, high, b);
        }
        __syncwarp();
        copy(stage);
        turn();
      }
      finish(tile, sums);
    }
  }

 private:
  // The copies are those of tile `next_`, columns `column_` and on; then of the tile after it.
  __device__ void copy(int stage) {
    if (next_ >= tiles_) return;
    const int bytes = 2 * min(places_.columns, p_.hidden_size - column_);
    const uint32_t barrier = shared_address(&arrived_[stage]);
    expect_copies(kTile * bytes, &arrived_[stage], lane_);
    if (lane_ < kTile) {
      // The last again: nobody stores it.
      const int64_t row = min(next_ * kTile + lane_, p_.vocab_size - 1);
      copy_bulk_once(stages_ + stage * places_.stage + lane_ * places_.pitch,
                     static_cast<const T*>(p_.embed) + row * p_.hidden_size + column_, bytes,
                     barrier);
    }
    column_ += places_.columns;
    if (column_ >= p_.hidden_size) column_ = 0, next_ += step_;
  }

  const HeadStep& p_;
  const Places& places_;
  uint64_t (&arrived_)[kStages];
  const int lane_ = threadIdx.x % 32, tiles_ = ceil_div(p_.vocab_size, kTile);
  const int step_ = kHeadWarps * gridDim.x, first_ = blockIdx.x + warp_index() * gridDim.x;
  char* stages_;
  int next_ = first_, column_ = 0;
};

}  // namespace tlinformer::cuda::step
