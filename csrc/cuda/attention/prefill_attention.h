// Many rows of one or more sequences on tensor cores: up to two softmaxes, outputs added.
#pragma once

#include <cstdint>

#include "../launch.cuh"
#include "tlinformer/config.h"

namespace tlinformer::cuda {

// (batch, heads, rows, d) of the call's dtype; strides in elements, the last dimension dense.
struct HeadTensor {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

// One softmax: all queries against `count` keys.
struct KeyGroup {
  HeadTensor keys{}, values{};
  int64_t count = 0;    // 0: the group contributes nothing
  bool causal = false;  // query row i reads keys 0 ... i + offset only
  int64_t offset = 0;   // >= 0
};

struct PrefillAttention {
  DType dtype = DType::bfloat16;
  int64_t batch = 1, rows = 0;
  int query_heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 1.0f;  // of the scores
  HeadTensor query{}, output{};
  KeyGroup groups[2]{};  // outputs are added
  // Log-sum-exp (natural) of each group, (2, batch, Hq, rows) float32; null: not wanted. -inf for
  // an empty group.
  float* log_sum_exp = nullptr;
  void* scratch = nullptr;  // 16-byte aligned, to split many keys over blocks; null: not split
  int64_t scratch_bytes = 0;
};

// Whether there is a kernel for heads of this size; the list of those sizes, for messages.
bool prefill_takes_head_size(int64_t head_dim);
const char* prefill_head_sizes();

// Bytes with which `rows` rows, or fewer, are split over enough blocks to fill the device.
int64_t prefill_attention_scratch(int64_t batch, int64_t rows, int query_heads, int head_dim);
void prefill_attention(const PrefillAttention& a, const Launch& how);

}  // namespace tlinformer::cuda
