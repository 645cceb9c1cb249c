// One new row per sequence against its cache: two softmaxes, outputs added.
#pragma once

#include <cstdint>

#include "../launch.cuh"
#include "../state.h"
#include "tlinformer/config.h"

namespace tlinformer::cuda {

// Keys or values of one layer: (sequences, Hkv, rows capacity, d), rows contiguous, row 0 of every
// head 16-byte aligned.
struct CachedRows {
  const void* keys = nullptr;
  const void* values = nullptr;
  int64_t sequence_stride = 0;  // in elements
  int64_t head_stride = 0;
};

enum class ContextRows { none, history, compressed };  // rows 0 ... state.history/compressed - 1

// Context rows are fetched before wait_for_previous(): with Launch.early, whatever writes them, or
// state.history or state.compressed, must have ended before any kernel of the token starts.
struct DecodeAttention {
  DType dtype = DType::bfloat16;
  int batch = 1;
  int query_heads = 0, kv_heads = 0, head_dim = 0;
  const float* query = nullptr;  // (batch, Hq d), rotated, times log2(e) / sqrt(d)
  void* output = nullptr;        // (batch, Hq d) of dtype; rows of sequences not live: untouched
  const SequenceState* state = nullptr;  // (batch); lengths are right also where not live
  ContextRows context_rows = ContextRows::none;
  CachedRows context{};
  // Rows first ... first + last - history, of which the last one was written by the kernel before.
  CachedRows window{};
  bool window_follows_history = false;  // first = state.history, else 0
  int64_t most_rows = 0;     // upper bound of context + window rows of a sequence, by the plan
  int most_window_rows = 0;  // and of window rows
  void* scratch = nullptr;   // decode_attention_scratch() bytes, zeroed once at creation
  int blocks = 0;            // thread blocks, at most multiprocessors(); 0: chosen here
};

// Throws where a block of the current device has less shared memory than these kernels may take.
void check_shared_memory();

int64_t decode_attention_scratch(int batch, int query_heads, int head_dim);
void decode_attention(const DecodeAttention& a, const Launch& how);

}  // namespace tlinformer::cuda
