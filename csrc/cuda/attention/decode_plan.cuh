// Which block attends to which rows: the rows of all sequences, passes and groups in a line, cut
// into equal shares. A pass is one reading of a key/value head's rows, context then window. Windows
// count as if they were full: a plan then holds from slide to slide.
#pragma once

#include "decode_attention.h"

namespace tlinformer::cuda {

constexpr int kShareAlignment = 16;  // rows: whole lines of 128 bytes, also of 72 bytes each

// Rows of one head fit int, rows of all heads need not.
struct SequenceRows {
  int64_t before = 0;           // rows of the sequences before it, of all passes
  int context = 0, window = 0;  // rows of a head in the plan; none if the sequence is not live
  int first = 0;                // row where the window begins
  int filled[2] = {0, 0};       // rows of both that exist, from the first on

  __device__ int rows() const { return context + window; }
  __device__ bool same(const SequenceRows& other) const {
    return filled[0] == other.filled[0] && window == other.window && first == other.first;
  }
};

__device__ inline SequenceRows rows_of(const DecodeAttention& a, int sequence) {
  // Past the L1 cache, which may keep what was read before wait_for_previous().
  const SequenceState* state = a.state + sequence;
  const int last = static_cast<int>(__ldcg(&state->last));
  const int history = static_cast<int>(__ldcg(&state->history));
  const int compressed = __ldcg(&state->compressed), live = __ldcg(&state->live);
  SequenceRows rows;
  if (live == 0) return rows;
  if (a.context_rows == ContextRows::history) rows.filled[0] = history;
  if (a.context_rows == ContextRows::compressed) rows.filled[0] = compressed;
  rows.context = (rows.filled[0] + kShareAlignment - 1) & -kShareAlignment;
  rows.filled[1] = max(last - history + 1, 1);
  rows.window = max(a.most_window_rows, rows.filled[1]);
  rows.first = a.window_follows_history ? history : 0;
  return rows;
}

// Of a, b >= 0.
__device__ inline int64_t divide(int64_t a, int64_t b) {
  if ((a | b) >> 32 != 0) return a / b;
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);  // much shorter
}

// A block's share of the rows, segment by segment: rows of one group of one pass.
struct Walk {
  int sequence, pass, group;  // group 0: context, 1: window
  int row;                    // of the group, where the segment begins
  int count;                  // rows of the segment; 0: the share is at its end
  int left;                   // rows of the share from `row` on

  __device__ void cut(const SequenceRows* table) {
    const SequenceRows& rows = table[sequence];
    count = min(left, (group == 0 ? rows.context : rows.window) - row);
  }
  // Rows that exist, at most `most`, from the segment's row `at` on; none or less: none.
  __device__ int exist(const SequenceRows* table, int at, int most) const {
    return min(min(count - at, most), table[sequence].filled[group] - row - at);
  }
  __device__ void next(const SequenceRows* table, int passes) {
    left -= count;
    count = row = 0;
    if (left == 0) return;
    if (group == 0) {
      group = 1;
    } else {
      if (++pass == passes) {
        pass = 0;
#pragma unroll 1
        do ++sequence;
        while (table[sequence].window == 0);
      }
      group = table[sequence].context > 0 ? 0 : 1;
    }
    cut(table);
  }
};

struct Plan {
  int64_t share;  // rows of a block
  Walk walk;      // of this block
};

// By one warp: fills the table and plans this block's share, at least `least` rows if there are.
__device__ inline void make_plan(const DecodeAttention& a, int passes, int least, int lane,
                                 SequenceRows* table, Plan* plan) {
  int64_t total = 0;
#pragma unroll 1
  for (int base = 0; base < a.batch; base += 32) {
    const int sequence = base + lane;
    SequenceRows rows;
    if (sequence < a.batch) rows = rows_of(a, sequence);
    const int64_t count = int64_t{passes} * rows.rows();
    int64_t sum = count;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t below = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += below;
    }
    rows.before = total + sum - count;
    if (sequence < a.batch) table[sequence] = rows;
    total += __shfl_sync(0xffffffffu, sum, 31);
  }
  const int64_t equal = divide(total + gridDim.x - 1, gridDim.x);
  const int64_t share = (max(equal, int64_t{least}) + kShareAlignment - 1) & -kShareAlignment;
  const int64_t begin = blockIdx.x * share;
  if (lane == 0) {
    plan->share = share;
    plan->walk = Walk{};
  }
  __syncwarp();
#pragma unroll 1
  for (int sequence = lane; sequence < a.batch; sequence += 32) {
    const SequenceRows rows = table[sequence];
    const int64_t at = begin - rows.before;
    if (at < 0 || at >= int64_t{passes} * rows.rows())
      continue;  // true of all sequences but one, or of all
    Walk walk;
    walk.sequence = sequence;
    walk.pass = static_cast<int>(divide(at, rows.rows()));
    walk.row = static_cast<int>(at - int64_t{walk.pass} * rows.rows());
    walk.group = walk.row < rows.context ? 0 : 1;
    if (walk.group == 1) walk.row -= rows.context;
    walk.left = static_cast<int>(min(share, total - begin));
    walk.cut(table);
    plan->walk = walk;
  }
}

}  // namespace tlinformer::cuda
