// What the CUDA backend needs besides the cache, in bytes from the start of the plan's "workspace"
// region. One layout, computed by the plan and used by the backend.
#pragma once

#include <algorithm>

#include "attention/decode_attention.h"
#include "attention/prefill_attention.h"
#include "dense/dense.h"
#include "state.h"
#include "step/product.h"
#include "step/sample.h"
#include "tlinformer/cache.h"
#include "tlinformer/error.h"

namespace tlinformer::cuda {

// Rows a slide streams at a time in either lane: many, so that launches and the last wave of every
// kernel cost little, but no more memory than a small part of the cache.
inline int64_t piece_rows(int64_t history) {
  constexpr int64_t kLeast = 4096, kMost = 16384;
  return std::max<int64_t>(1, std::min(history, std::clamp(history / 16, kLeast, kMost)));
}

// Rows that a product of `rows` rows computes: few different shapes, so that cuBLASLt has chosen
// and loaded its kernels before anyone waits for them. Nobody reads the rows beyond.
inline int64_t padded_rows(int64_t rows) {
  const int64_t multiple = rows <= 512 ? 64 : 512;
  return (rows + multiple - 1) / multiple * multiple;
}

// Whether the first projection of every token of the vocabulary is kept. A history of V tokens
// saves as much work as the table takes, once; a quarter of that is already worth the memory.
inline bool keeps_table(const Config& c, const CachePlanOptions& options) {
  return 4 * c.history_at(options.max_context - 1) >= c.vocab_size;
}

inline void check_supported(const Config& c, const CachePlanOptions& options) {
  constexpr int kHeadSizes[] = {32, 36, 40, 48, 64, 80, 96, 128};
  require(std::count(std::begin(kHeadSizes), std::end(kHeadSizes), c.head_dim()) == 1,
          "hidden_size / num_attention_heads = ", c.head_dim(),
          "; on CUDA it must be 32, 36, 40, 48, 64, 80, 96 or 128 (the CPU takes any)");
  require(c.hidden_size % 8 == 0, "hidden_size = ", c.hidden_size,
          "; on CUDA it must be a multiple of 8 (the CPU takes any)");
  require(c.intermediate_size % 8 == 0, "intermediate_size = ", c.intermediate_size,
          "; on CUDA it must be a multiple of 8 (the CPU takes any)");
  require(options.dtype != DType::float32,
          "dtype is float32; the CUDA backend computes in bfloat16 and float16");
  require(options.max_context < (int64_t{1} << 31), "max_context = ", options.max_context,
          "; on CUDA it must be less than ", int64_t{1} << 31);
  check_shared_memory();
}

struct Workspace {
  // Of a token; B sequences.
  int64_t state = 0;       // SequenceState, (B)
  int64_t sampling = 0;    // DeviceSampling
  int64_t draws = 0;       // int64
  int64_t step_x = 0;      // float32 (B, D)
  int64_t parts = 0;       // of a single sequence's x: float32 (kMostParts, kPartPitch)
  int64_t step_query = 0;  // float32 (B, Hq d)
  int64_t rotations = 0;   // float2 (B, d / 2), of the newest token
  int64_t attended = 0;    // (B, Hq d)
  int64_t hidden = 0;      // (B, F)
  int64_t logits = 0;      // float32 (B, V)
  int64_t candidates = 0;  // Candidate (B, head_candidates)
  int64_t seen = 0;        // flags (B, V)
  int64_t stops = 0;       // flags (V)
  int64_t decode = 0;      // of decode_attention
  int64_t sample = 0;      // of sample_step
  int64_t step_bytes = 0;  // of all above, zeroed at creation
  int64_t tokens = 0;      // int32 (B, max_context)

  // Of many rows of one sequence.
  int64_t tail = 0;     // x of the compressed history, then of the window: float32 (rows, D)
  int64_t biases = 0;   // out_proj biases in float32, (layers, D)
  bool tabled = false;  // keeps_table()
  int64_t table = 0;    // block 0's first q, k, v of each token, not rotated, (V, (Hq + 2 Hkv) d)
  struct Lane {
    int64_t rows = 0;        // R: most rows at once, padded like all of these
    int64_t history = 0;     // x of a piece of the history, float32 (piece, D)
    int64_t normed = 0;      // (R, D)
    int64_t gated_rows = 0;  // of gate and up at once, where each is a product of its own
    int64_t wide = 0;        // (R, (Hq + 2 Hkv) d), (gated_rows, 2 F), float32 (R, D)
    int64_t query = 0;       // (R, Hq d)
    int64_t output = 0;      // (R, max(Hq d, F)): attended, then the MLP's hidden rows
    int64_t attention = 0;   // of prefill_attention
    int64_t dense = 0;       // of cuBLASLt
  };
  Lane lanes[2];  // the pieces of a history go through two lanes in turn
  int64_t attention_bytes = 0;
  int64_t bytes = 0;

  static Workspace layout(const Config& c, const CachePlan& plan) {
    const CachePlanOptions& options = plan.options();
    const int64_t batch = options.batch_size;
    const int64_t woh = c.compressed_rows(c.history_at(options.max_context - 1));
    const int64_t wog = std::min(c.generation_window, options.max_context);
    const int64_t piece = plan.piece_rows();
    const int64_t element = size_of(options.dtype);
    const int64_t d = c.hidden_size, f = c.intermediate_size, v = c.vocab_size;
    const int64_t line = c.query_dim() + 2 * c.kv_dim();
    Workspace w;
    const auto take = [&w](int64_t bytes) {
      const int64_t begin = w.bytes;
      w.bytes += (bytes + 255) / 256 * 256;
      return begin;
    };
    const int heads = static_cast<int>(c.num_attention_heads);
    const int head_dim = static_cast<int>(c.head_dim());
    w.state = take(batch * static_cast<int64_t>(sizeof(SequenceState)));
    w.sampling = take(sizeof(DeviceSampling));
    w.draws = take(8);
    w.step_x = take(batch * d * 4);
    w.parts = take(int64_t{kMostParts} * kPartPitch * 4);
    w.step_query = take(batch * c.query_dim() * 4);
    w.rotations = take(batch * head_dim / 2 * 8);
    w.attended = take(batch * c.query_dim() * element);
    w.hidden = take(batch * f * element);
    w.logits = take(batch * v * 4);
    w.candidates = take(batch * head_candidates(static_cast<int>(v)) *
                        static_cast<int64_t>(sizeof(Candidate)));
    w.seen = take(batch * v);
    w.stops = take(v);
    w.decode = take(decode_attention_scratch(static_cast<int>(batch), heads, head_dim));
    w.sample = take(sample_scratch(static_cast<int>(batch), static_cast<int>(v)));
    w.step_bytes = w.bytes;
    w.tokens = take(batch * options.max_context * 4);
    w.tail = take((woh + padded_rows(woh + wog)) * d * 4);
    w.biases = take(c.num_layers() * d * 4);
    w.tabled = keeps_table(c, options);
    w.table = take(w.tabled ? v * line * element : 0);
    w.attention_bytes = prefill_attention_scratch(1, std::max(woh, wog), heads, head_dim);
    for (Lane& lane : w.lanes) {
      lane.rows = padded_rows(&lane == w.lanes ? std::max(piece, woh + wog) : piece);
      lane.history = take(padded_rows(piece) * d * 4);
      lane.normed = take(lane.rows * d * element);
      lane.gated_rows = std::max(std::min<int64_t>(lane.rows, 512), lane.rows / 1024 * 512);
      lane.wide = take(std::max(
          {lane.rows * line * element, lane.gated_rows * 2 * f * element, lane.rows * d * 4}));
      lane.query = take(lane.rows * c.query_dim() * element);
      lane.output = take(lane.rows * std::max(c.query_dim(), f) * element);
      lane.attention = take(w.attention_bytes);
      lane.dense = take(Dense::workspace_bytes());
    }
    return w;
  }
};

}  // namespace tlinformer::cuda
