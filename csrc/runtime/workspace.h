// What a backend needs besides the cache: float32 tensors carved out of the plan's "workspace"
// region. One layout, computed by the plan and used by the backend.
#pragma once

#include <algorithm>

#include "tlinformer/cache.h"

namespace tlinformer {

struct Workspace {
  int64_t rows = 0;        // most rows a stage works on at once
  int64_t panel_rows = 0;  // rows of a weight matrix converted to float32 at a time; 0: none

  // Offsets in floats; R = rows.
  int64_t window = 0;      // x of the window, (max(Wog, B), D)
  int64_t compressed = 0;  // x of the compressed history, (Woh, D)
  int64_t history = 0;     // x of a piece of the history, (piece, D)
  int64_t query = 0;       // (R, Hq d)
  int64_t output = 0;      // (R, Hq d)
  int64_t normed = 0;      // (R, D); also the output of the second softmax
  int64_t wide = 0;        // (R, max(2 F, (Hq + 2 Hkv) d))
  int64_t softmax = 0;     // running maximum and sum, (R, Hq, 2)
  int64_t rope = 0;        // cos and sin, (R, d)
  int64_t logits = 0;      // (B, V)
  int64_t panel = 0;       // (panel_rows, max(D, F))
  int64_t floats = 0;      // in all

  static Workspace layout(const Config& c, const CachePlanOptions& options, int64_t piece_rows) {
    Workspace w;
    const int64_t woh = c.compressed_rows(c.history_at(options.max_context - 1));
    const int64_t wog = std::min(c.generation_window, options.max_context);
    const int64_t window_rows = std::max(wog, options.batch_size);
    w.rows = std::max({piece_rows, woh, window_rows});
    const int64_t inner = std::max(c.hidden_size, c.intermediate_size);
    const int64_t outer = std::max({inner, c.query_dim() + 2 * c.kv_dim(), c.vocab_size});
    if (options.dtype != DType::float32) {
      constexpr int64_t kPanelFloats = int64_t{1} << 20;  // 4 MiB: shared by all cores from L3
      w.panel_rows = std::min(outer, std::max<int64_t>(64, kPanelFloats / inner));
    }
    const auto take = [&w](int64_t floats) {
      const int64_t begin = w.floats;
      w.floats += (floats + 15) / 16 * 16;
      return begin;
    };
    w.window = take(window_rows * c.hidden_size);
    w.compressed = take(woh * c.hidden_size);
    w.history = take(piece_rows * c.hidden_size);
    w.query = take(w.rows * c.query_dim());
    w.output = take(w.rows * c.query_dim());
    w.normed = take(w.rows * c.hidden_size);
    w.wide = take(w.rows * std::max(2 * c.intermediate_size, c.query_dim() + 2 * c.kv_dim()));
    w.softmax = take(w.rows * c.num_attention_heads * 2);
    w.rope = take(w.rows * c.head_dim());
    w.logits = take(options.batch_size * c.vocab_size);
    w.panel = take(w.panel_rows * inner);
    return w;
  }
};

}  // namespace tlinformer
