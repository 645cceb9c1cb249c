// Attention of training, forward and backward: ranges of rows read ranges of keys of the same
// sequence. All windows of a sequence are one launch.
#pragma once

#include <cstdint>

#include "prefill_attention.h"

namespace tlinformer::cuda {

// Rows query ... query + rows - 1 of the queries; what they read makes the rows from `output` on.
struct Segment {
  int query = 0, rows = 0, output = 0;
  int window = 0;        // row i reads keys window ... window + i of the window; < 0: none of them
  int context = 0;       // and, with a softmax of its own, `context_rows` keys of the context from
  int context_rows = 0;  // this one on
};

constexpr int kMostSegments = 128;  // they travel as a kernel's parameter

// Every output row belongs to one segment; a query or a key may belong to any number of them.
struct RangedAttention {
  DType dtype = DType::bfloat16;
  int64_t batch = 1, query_rows = 0, output_rows = 0;
  int64_t key_rows[2]{};  // of the window's keys and the context's
  int query_heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 1.0f;  // of the scores
  HeadTensor query{}, output{};
  HeadTensor keys[2]{}, values[2]{};  // of the window, of the context; one tensor can be both
  const Segment* segments = nullptr;  // on the host
  int segment_count = 0;
  // What the gradient needs; output is the window's term, as stored here, plus the context's.
  // (batch, 2 Hq, output rows, d): all heads' terms of the output from the window, then those from
  // the context; null if no segment reads both. (Their sum lacks what it lost of a term: gradients
  // that cancel, as of a row which sees one key, would be wrong by that.)
  // (2, batch, Hq, output rows) float32: log-sum-exp to base 2.
  HeadTensor terms{};
  float* log_sum_exp = nullptr;
  // A probability is dropped where dropout * 2^32 exceeds its bits; see dropout_bits.cuh.
  float dropout = 0;              // below 1
  const int64_t* seed = nullptr;  // on the device; only read with dropout
};

// Written whole, rows that no segment names too. keys[1] may be keys[0], values[1] values[0]: the
// sum of both, as is right where the window's and the context's keys are one tensor.
struct RangedGradient {
  HeadTensor output{};  // the gradient that arrives
  HeadTensor query{}, keys[2]{}, values[2]{};
  float* delta = nullptr;  // scratch of log_sum_exp's size
};

void ranged_attention(const RangedAttention& a, const Launch& how);
void ranged_attention_gradient(const RangedAttention& a, const RangedGradient& gradient,
                               const Launch& how);

}  // namespace tlinformer::cuda
