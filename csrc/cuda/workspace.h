// What the CUDA backend needs besides the cache, in bytes from the start of the plan's "workspace"
// region. One layout, computed by the plan and used by the backend.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "attention/decode_attention.h"
#include "attention/prefill_attention.h"
#include "cluster/cluster_step.h"
#include "dense/dense.h"
#include "state.h"
#include "step/product.h"
#include "step/sample.h"
#include "tlinformer/cache.h"
#include "tlinformer/error.h"

namespace tlinformer::cuda {

// Rows a slide streams at a time: enough for the tensor cores, few enough for the L2 cache.
constexpr int64_t kPieceRows = 8192;

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
}

// TLINFORMER_GEAR=wide leaves the cluster out, for measurements of one gear against the other.
inline bool wide_gear_only() {
  const char* gear = std::getenv("TLINFORMER_GEAR");
  return gear && std::strcmp(gear, "wide") == 0;
}

struct Workspace {
  int64_t rows = 0;  // R: most rows a stage works on at once

  // Of a token; B sequences.
  int64_t state = 0;       // SequenceState, (B)
  int64_t sampling = 0;    // DeviceSampling
  int64_t draws = 0;       // int64
  int64_t step_x = 0;      // float32 (B, D)
  int64_t step_query = 0;  // float32 (B, Hq d)
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
  int64_t packed = 0;      // weights as the cluster streams them; empty without a cluster

  // Of many rows of one sequence.
  int64_t window = 0;      // x of the window, float32 (Wog, D)
  int64_t compressed = 0;  // x of the compressed history, float32 (Woh, D)
  int64_t history = 0;     // x of a piece of the history, float32 (piece, D)
  int64_t biases = 0;      // out_proj biases in float32, (layers, D)
  int64_t normed = 0;      // (R, D)
  int64_t wide = 0;        // (R, max(2 F, (Hq + 2 Hkv) d))
  int64_t query = 0;       // (R, Hq d)
  int64_t output = 0;      // (R, max(Hq d, F)): attended, then the MLP's hidden rows
  int64_t attention = 0;   // of prefill_attention
  int64_t dense = 0;       // of cuBLASLt
  int64_t attention_bytes = 0;
  bool cluster = false;
  int64_t bytes = 0;

  static Workspace layout(const Config& c, const CachePlan& plan) {
    const CachePlanOptions& options = plan.options();
    const int64_t batch = options.batch_size;
    const int64_t woh = c.compressed_rows(c.history_at(options.max_context - 1));
    const int64_t wog = std::min(c.generation_window, options.max_context);
    const int64_t element = size_of(options.dtype);
    const int64_t d = c.hidden_size, f = c.intermediate_size, v = c.vocab_size;
    Workspace w;
    w.rows = std::max({plan.piece_rows(), woh, wog});
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
    w.step_query = take(batch * c.query_dim() * 4);
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
    w.cluster =
        batch == 1 && !wide_gear_only() && ClusterStep::supports(c, options.dtype, wog, woh);
    w.packed = take(w.cluster ? ClusterStep::packed_bytes(c) : 0);
    w.window = take(wog * d * 4);
    w.compressed = take(woh * d * 4);
    w.history = take(plan.piece_rows() * d * 4);
    w.biases = take(c.num_layers() * d * 4);
    w.normed = take(w.rows * d * element);
    w.wide = take(w.rows * std::max(2 * f, c.query_dim() + 2 * c.kv_dim()) * element);
    w.query = take(w.rows * c.query_dim() * element);
    w.output = take(w.rows * std::max(c.query_dim(), f) * element);
    w.attention_bytes = prefill_attention_scratch(1, std::max(woh, wog), heads, head_dim);
    w.attention = take(w.attention_bytes);
    w.dense = take(Dense::workspace_bytes());
    return w;
  }
};

}  // namespace tlinformer::cuda
