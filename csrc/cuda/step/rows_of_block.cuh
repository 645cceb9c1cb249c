// Which of many sequences a block takes.
#pragma once

#include "product.h"
#include "weight_stream.cuh"

namespace tlinformer::cuda::step {

// Of 8 NT sequences each; blockIdx.y counts the blocks.
template <int NT>
struct RowsOfBlock {
  int first, count;
  __device__ explicit RowsOfBlock(int batch)
      : first(blockIdx.y * 8 * NT), count(min(batch - first, 8 * NT)) {}
};

// Whether a row takes part; rows past the last do not. Volatile: the load would otherwise be put
// off until there is nothing to hide it behind.
__device__ inline bool is_live(const StepRows& p, int row) {
  const volatile SequenceState& state = p.state[min(row, p.batch - 1)];
  return state.live != 0 && row < p.batch;
}

template <int NT>
dim3 grid_of(const StepRows& p, int tiles) {
  return {static_cast<unsigned>(tiles), static_cast<unsigned>(ceil_div(p.batch, 8 * NT))};
}

}  // namespace tlinformer::cuda::step
