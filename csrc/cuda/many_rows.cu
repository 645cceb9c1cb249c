#include <cmath>

#include "../runtime/range.h"
#include "dense/gated.h"
#include "many_rows.h"

namespace tlinformer::cuda {
namespace {

// A dense (rows, heads, d) activation as heads of one sequence.
HeadTensor activation(void* data, int64_t heads, int64_t d) { return {data, 0, d, heads * d}; }

constexpr int64_t kFewRows = 1024;  // too few blocks for the gated product

}  // namespace

ManyRows::ManyRows(const Model& model, const Workspace& workspace, int lane, char* base,
                   cudaStream_t stream)
    : m_(model),
      w_(workspace),
      lane_(workspace.lanes[lane]),
      base_(base),
      how_{stream, false},
      dense_(model.dtype, base + workspace.lanes[lane].dense, Dense::workspace_bytes()),
      gated_(takes_gated_product(model.dtype, model.c.hidden_size, model.c.intermediate_size)) {
  if (lane == 0) widen_biases();
  prepare();
  if (lane == 0 && w_.tabled) project_vocabulary();
}

void ManyRows::widen_biases() {
  // cuBLASLt adds a bias of the output's type, which is float32 where a residual is added to.
  float* to = reinterpret_cast<float*>(base_ + w_.biases);
  for (const LayerWeights& layer : m_.weights.layers) {
    widen(m_.dtype, layer.out_proj_bias, to, m_.c.hidden_size, how_);
    to += m_.c.hidden_size;
  }
}

// Block 0's first queries, keys and values depend on the token alone, but for their rotation.
void ManyRows::project_vocabulary() {
  const LayerWeights& layer = m_.weights.layers.front();
  const int64_t vocab = m_.c.vocab_size, d = m_.c.hidden_size, columns = line_columns();
  const Norm attention_norm = m_.norm(layer.attn_norm_weight, layer.attn_norm_bias);
  for (int64_t first = 0; first < vocab; first += lane_.rows) {
    NormRows n;
    n.dtype = m_.dtype;
    n.rows = std::min(lane_.rows, vocab - first);
    n.hidden_size = m_.hidden();
    n.embed = static_cast<const char*>(m_.weights.embed_tokens) + first * d * m_.element();
    n.norm = &attention_norm;
    n.normed = base_ + lane_.normed;
    norm_rows(n, how_);
    dense_.product(n.normed, n.rows, layer.qkv_proj_weight, layer.qkv_proj_bias, columns, d,
                   base_ + w_.table + first * columns * m_.element(), columns, how_);
  }
}

// cuBLASLt takes milliseconds when it first meets a shape; after this none is new.
void ManyRows::prepare() {
  const LayerWeights& layer = m_.weights.layers.front();
  const int64_t d = m_.c.hidden_size, dq = m_.c.query_dim(), dkv = m_.c.kv_dim();
  const int64_t f = m_.c.intermediate_size;
  const char* input = base_ + lane_.normed;
  const int64_t piece = padded_rows(m_.plan.piece_rows());
  char* wide = base_ + lane_.wide;
  for (int64_t rows = 64; rows <= lane_.rows; rows = padded_rows(rows + 1)) {
    for (int64_t columns : {dq, 2 * dkv, dq + 2 * dkv}) {
      dense_.product(input, rows, layer.qkv_proj_weight, layer.qkv_proj_bias, columns, d, wide,
                     columns, how_);
    }
    if ((!gated_ || rows <= kFewRows) && rows <= lane_.gated_rows) {
      dense_.product(input, rows, layer.gate_proj_weight, nullptr, f, d, wide, 2 * f, how_);
    }
    const float* bias = reinterpret_cast<const float*>(base_ + w_.biases);
    // More rows than a piece has are the compressed history's and the window's.
    float* x = reinterpret_cast<float*>(base_ + (rows > piece ? w_.tail : lane_.history));
    dense_.set(input, rows, layer.out_proj_weight, bias, d, dq, x, how_);
    dense_.add(input, rows, layer.out_proj_weight, bias, d, dq, x, how_);
    dense_.add(base_ + lane_.output, rows, layer.down_proj_weight, nullptr, d, f, x, how_);
  }
}

void ManyRows::take(float* x, int64_t rows, int64_t first) {
  x_ = x;
  rows_ = rows;
  padded_ = padded_rows(rows);
  first_ = first;
}

const float* ManyRows::run(const Stage& stage, const Span& span) {
  const int64_t d = m_.c.hidden_size;
  float* const tail = reinterpret_cast<float*>(base_ + w_.tail);
  take(stage.scope == Scope::window       ? tail + span.compressed * d
       : stage.scope == Scope::compressed ? tail
                                          : reinterpret_cast<float*>(base_ + lane_.history),
       span.rows, 0);
  tokens_ = nullptr;
  for (const Verb& verb : stage.verbs) run({{verb, span, 0}});
  return x_ + (rows_ - 1) * d;
}

const float* ManyRows::run_pair(const Stage& compressed, const Span& history, const Stage& window,
                                const Span& own) {
  const int64_t d = m_.c.hidden_size;
  float* const tail = reinterpret_cast<float*>(base_ + w_.tail);
  take(tail, history.rows + own.rows, 0);
  tokens_ = nullptr;
  auto other = compressed.verbs.begin();
  for (const Verb& verb : window.verbs) {
    if (other != compressed.verbs.end()) {
      run({{*other++, history, 0}, {verb, own, history.rows}});
    } else {  // the last layer compresses keys and values alone
      if (x_ == tail) take(tail + history.rows * d, own.rows, history.rows);
      run({{verb, own, 0}});
    }
  }
  return x_ + (rows_ - 1) * d;
}

void ManyRows::run(Parts parts) {
  const auto& [verb, span, row] = *parts.begin();
  const Range range(name_of(verb), verb.block * m_.c.block_depth + verb.layer);
  // Only models of three blocks or more store the history's stream between two of them.
  const auto stream = [&, at = span.begin * m_.c.hidden_size] {
    return reinterpret_cast<float*>(m_.arena + m_.plan.find("stream")->offset) + at;
  };
  switch (verb.kind) {
    case Verb::Kind::embed:
      tokens_ = reinterpret_cast<const int32_t*>(base_ + w_.tokens) +
                span.sequence * m_.plan.options().max_context + span.begin;
      break;
    case Verb::Kind::load:
      copy(x_, stream());
      break;
    case Verb::Kind::store:
      copy(stream(), x_);
      break;
    case Verb::Kind::keep:
      keep(span);
      break;
    case Verb::Kind::project:
      project(parts);
      break;
    case Verb::Kind::attend:
      for (const Part& part : parts) attend(part);
      break;
    case Verb::Kind::finish:
      finish(verb);
      break;
    case Verb::Kind::head:
      break;
  }
}

// x <- the embedded tokens, if it does not hold its rows yet; with a norm, normed <- norm(x).
void ManyRows::norm(const Norm* norm) {
  NormRows n;
  n.dtype = m_.dtype;
  n.rows = rows_;
  n.hidden_size = m_.hidden();
  n.tokens = tokens_;
  n.embed = tokens_ != nullptr ? m_.weights.embed_tokens : nullptr;
  n.x = x_;
  n.norm = norm;
  n.normed = base_ + lane_.normed;
  norm_rows(n, how_);
  tokens_ = nullptr;
}

void ManyRows::project(Parts parts) {
  const int64_t dq = m_.c.query_dim();
  int64_t first = dq, end = dq;  // columns that any part wants
  for (const Part& part : parts) {
    if (part.verb.queries) first = 0;
    if (part.verb.keys_values) end = line_columns();
  }
  const Part &whole = *parts.begin(), &last = *(parts.end() - 1);
  RotateRows r;
  if (w_.tabled && tokens_ != nullptr) {
    r.lines = base_ + w_.table + first * m_.element();
    r.line_stride = line_columns();
    r.tokens = tokens_;
  } else {
    product_of_x(whole.verb, first, end - first);
    r.lines = base_ + lane_.wide;
    r.line_stride = end - first;
  }
  r.dtype = m_.dtype;
  r.rows = rows_;
  r.begin = whole.span.begin;
  r.query_heads = m_.heads();
  r.kv_heads = m_.kv_heads();
  r.head_dim = m_.head_dim();
  r.rope = m_.rope;
  if (first == 0) r.query = base_ + lane_.query;
  static_cast<CachePlace&>(r) = place(last);
  r.apart = last.first;
  if (r.apart > 0) r.own = place(whole);
  rotate_rows(r, how_);
}

// Makes a projection's lines: so many columns of it, from the first on.
void ManyRows::product_of_x(const Verb& verb, int64_t first, int64_t columns) {
  const LayerWeights& layer = m_.layer(verb);
  const Norm attention_norm = m_.norm(layer.attn_norm_weight, layer.attn_norm_bias);
  norm(&attention_norm);
  const int64_t inputs = m_.c.hidden_size;
  dense_.product(base_ + lane_.normed, padded_,
                 static_cast<const char*>(layer.qkv_proj_weight) + first * inputs * m_.element(),
                 static_cast<const char*>(layer.qkv_proj_bias) + first * m_.element(), columns,
                 inputs, base_ + lane_.wide, columns, how_);
}

// Where a projection's keys and values go.
CachePlace ManyRows::place(const Part& part) const {
  const auto& [verb, span, row] = part;
  if (!verb.keys_values) return {};
  const Slots slots = slots_of(m_.plan, *verb.keys_values, verb.block, verb.layer, span);
  const KeyGroup group = keys(*verb.keys_values, verb, span);
  // Row 0 of the head, whatever the first row that attention reads.
  const int64_t skipped = slots.first * m_.c.head_dim() * m_.element();
  return {static_cast<char*>(group.keys.data) - skipped,
          static_cast<char*>(group.values.data) - skipped, group.keys.head_stride,
          span.begin - slots.base};
}

KeyGroup ManyRows::keys(Cache cache, const Verb& verb, const Span& span) const {
  const Slots slots = slots_of(m_.plan, cache, verb.block, verb.layer, span);
  const CachedRows rows = m_.rows(cache, verb);
  const int64_t d = m_.c.head_dim();
  const int64_t skip = (span.sequence * rows.sequence_stride + slots.first * d) * m_.element();
  const auto tensor = [&](const void* data) -> HeadTensor {
    char* at = const_cast<char*>(static_cast<const char*>(data)) + skip;
    return {at, rows.sequence_stride, rows.head_stride, d};
  };
  KeyGroup group;
  group.keys = tensor(rows.keys);
  group.values = tensor(rows.values);
  group.count = slots.count;
  group.causal = cache == Cache::window;
  group.offset = group.causal ? span.begin - span.history : 0;
  return group;
}

void ManyRows::attend(const Part& part) {
  const auto& [verb, span, row] = part;
  const int64_t row_bytes = m_.c.query_dim() * m_.element();
  PrefillAttention a;
  a.dtype = m_.dtype;
  a.rows = span.rows;
  a.query_heads = m_.heads();
  a.kv_heads = m_.kv_heads();
  a.head_dim = m_.head_dim();
  a.scale = 1 / std::sqrt(static_cast<float>(m_.head_dim()));
  a.query = activation(base_ + lane_.query + (first_ + row) * row_bytes, m_.c.num_attention_heads,
                       m_.c.head_dim());
  a.output =
      activation(base_ + lane_.output + row * row_bytes, m_.c.num_attention_heads, m_.c.head_dim());
  int groups = 0;
  if (verb.causal) a.groups[groups++] = keys(Cache::window, verb, span);
  if (verb.context && keys_read(verb, span) > 0) {
    a.groups[groups++] = keys(*verb.context, verb, span);
  }
  a.scratch = base_ + lane_.attention;
  a.scratch_bytes = w_.attention_bytes;
  prefill_attention(a, how_);
}

void ManyRows::finish(const Verb& verb) {
  const LayerWeights& layer = m_.layer(verb);
  const int64_t d = m_.c.hidden_size;
  const float* bias = reinterpret_cast<const float*>(base_ + w_.biases) +
                      (verb.block * m_.c.block_depth + verb.layer) * d;
  const Norm mlp_norm = m_.norm(layer.mlp_norm_weight, layer.mlp_norm_bias);
  const void* const attended = base_ + lane_.output;
  GatedProduct g{m_.dtype,
                 rows_,
                 d,
                 m_.c.intermediate_size,
                 x_,
                 mlp_norm,
                 layer.gate_proj_weight,
                 layer.up_proj_weight,
                 base_ + lane_.output};
  const bool gated = gated_ && rows_ > kFewRows;
  if (gated && tokens_ != nullptr) {  // it makes x's rows, too
    float* const branch = reinterpret_cast<float*>(base_ + lane_.wide);
    dense_.set(attended, padded_, layer.out_proj_weight, bias, d, m_.c.query_dim(), branch, how_);
    g.embed = m_.weights.embed_tokens;
    g.tokens = tokens_;
    g.branch = branch;
    tokens_ = nullptr;
  } else {
    if (tokens_ != nullptr) norm(nullptr);
    dense_.add(attended, padded_, layer.out_proj_weight, bias, d, m_.c.query_dim(), x_, how_);
  }
  if (gated) {
    gated_product(g, how_);
  } else {
    norm(&mlp_norm);
    gate(layer);
  }
  dense_.add(base_ + lane_.output, padded_, layer.down_proj_weight, nullptr, d,
             m_.c.intermediate_size, x_, how_);
}

// output (rows, F) <- silu(gate) * up, of the normed rows.
void ManyRows::gate(const LayerWeights& layer) {
  const int64_t d = m_.c.hidden_size, f = m_.c.intermediate_size;
  const char* normed = base_ + lane_.normed;
  char *gate_up = base_ + lane_.wide, *hidden = base_ + lane_.output;
  for (int64_t first = 0; first < rows_; first += lane_.gated_rows) {
    const int64_t rows = std::min(lane_.gated_rows, rows_ - first), padded = padded_rows(rows);
    const char* from = normed + first * d * m_.element();
    dense_.product(from, padded, layer.gate_proj_weight, nullptr, f, d, gate_up, 2 * f, how_);
    dense_.product(from, padded, layer.up_proj_weight, nullptr, f, d, gate_up + f * m_.element(),
                   2 * f, how_);
    silu_rows(m_.dtype, gate_up, hidden + first * f * m_.element(), rows, f, how_);
  }
}

void ManyRows::copy(float* to, const float* from) const {
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(rows_ * m_.c.hidden_size) * 4,
                        cudaMemcpyDeviceToDevice, how_.stream),
        "copy of the history stream");
}

void ManyRows::keep(const Span& span) {
  const int64_t first = span.history - span.compressed;  // position of the stream's row 0
  const int64_t skip = std::max<int64_t>(0, first - span.begin);
  if (skip >= span.rows) return;
  const int64_t d = m_.c.hidden_size;
  check(cudaMemcpyAsync(reinterpret_cast<float*>(base_ + w_.tail) + (span.begin + skip - first) * d,
                        x_ + skip * d, static_cast<size_t>((span.rows - skip) * d) * 4,
                        cudaMemcpyDeviceToDevice, how_.stream),
        "copy of the compressed rows");
}

}  // namespace tlinformer::cuda
