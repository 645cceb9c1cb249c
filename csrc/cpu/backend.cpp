// The verbs on the CPU, run one by one.
#include "../runtime/backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../runtime/range.h"
#include "../runtime/threads.h"
#include "../runtime/verb_meter.h"
#include "../runtime/workspace.h"
#include "arena.h"
#include "attend.h"
#include "key_value_cache.h"
#include "layer.h"
#include "rope.h"
#include "sample.h"

namespace tlinformer {
namespace cpu {
namespace {

class CpuBackend final : public Backend {
 public:
  CpuBackend(const Config& config, const Weights& weights, const CachePlan& plan, Arena arena,
             const EngineOptions& options)
      : c_(config),
        plan_(plan),
        arena_(static_cast<char*>(arena.data)),
        dtype_(plan.options().dtype),
        threads_(threads_of(options)),
        w_(Workspace::layout(config, plan.options(), plan.piece_rows())),
        base_(reinterpret_cast<float*>(arena_ + plan.find("workspace")->offset)),
        dense_(dtype_, threads_, base_ + w_.panel, w_.panel_rows),
        cache_(c_, plan_, arena_, threads_),
        rope_(config.head_dim(), config.rope_theta, threads_),
        attend_(config, dtype_, threads_, plan.options().batch_size, base_ + w_.normed,
                base_ + w_.softmax) {
    require(dtype_ != DType::float16,
            "the CPU backend computes in float32 and bfloat16, not float16");
    require(weights.dtype == dtype_, "the weights are ", name_of(weights.dtype),
            ", the cache plan is ", name_of(dtype_), "; they must agree");
    touch(arena_, arena.bytes, threads_);
    embed_ = {weights.embed_tokens, nullptr, c_.vocab_size, c_.hidden_size};
    norm_weight_ = to_floats(dtype_, weights.norm_weight, c_.hidden_size);
    norm_bias_ = to_floats(dtype_, weights.norm_bias, c_.hidden_size);
    for (const LayerWeights& from : weights.layers) layers_.emplace_back(c_, dtype_, from);
    queries_.reserve(static_cast<size_t>(plan.options().batch_size));
    tokens_.resize(static_cast<size_t>(plan.options().batch_size));
    warm_up();
  }

  void write_tokens(int64_t sequence, int64_t begin, const int32_t* tokens,
                    int64_t count) override {
    Tokens& to = tokens_[static_cast<size_t>(sequence)];
    to.reserve(static_cast<size_t>(plan_.options().max_context));
    to.resize(static_cast<size_t>(begin));
    to.insert(to.end(), tokens, tokens + count);
  }

  void run(const Stage& stage, const std::vector<Span>& spans, const Poll& poll) override {
    spans_ = &spans;
    rows_ = 0;
    for (const Span& span : spans) rows_ += span.rows;
    if (rows_ == 0) return;
    x_ = base_ + (stage.scope == Scope::window       ? w_.window
                  : stage.scope == Scope::compressed ? w_.compressed
                                                     : w_.history);
    int64_t row = 0;
    for (const Span& span : spans) {
      rope_.angles(span.begin, span.rows, base_ + w_.rope + row * c_.head_dim());
      row += span.rows;
    }
    for (const Verb& verb : stage.verbs) {
      const Range range(name_of(verb), verb.block * c_.block_depth + verb.layer);
      const VerbMeter::Timed timed(meter_, name_of(verb));
      switch (verb.kind) {
        case Verb::Kind::embed:
          embed();
          break;
        case Verb::Kind::load:
          std::memcpy(x_, stream(), row_bytes(rows_));
          break;
        case Verb::Kind::store:
          std::memcpy(stream(), x_, row_bytes(rows_));
          break;
        case Verb::Kind::keep:
          keep();
          break;
        case Verb::Kind::project:
          project(verb);
          break;
        case Verb::Kind::attend:
          attend(verb, poll);
          break;
        case Verb::Kind::finish:
          finish(layer(verb));
          break;
        case Verb::Kind::head:
          head();
          break;
      }
    }
  }

  const float* logits() const override { return base_ + w_.logits; }

  void copy_logits(float* to, int64_t sequences) const override {
    std::memcpy(to, logits(), static_cast<size_t>(sequences * c_.vocab_size) * sizeof(float));
  }

  void read(const void* from, int64_t bytes, void* to) override {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
  void write(const void* from, int64_t bytes, void* to) override { read(from, bytes, to); }
  Tokens read_tokens(int64_t sequence, int64_t count) override {
    const Tokens& tokens = tokens_[static_cast<size_t>(sequence)];
    return {tokens.begin(), tokens.begin() + count};
  }
  void write_logits(int64_t sequence, const float* from) override {
    std::copy(from, from + c_.vocab_size, base_ + w_.logits + sequence * c_.vocab_size);
  }

  void begin(const SamplingParams& params, const std::vector<Span>& last) override {
    sampling_ = params;
    seen_.clear();
    if (params.repetition_penalty == 1.0) return;
    seen_.resize(tokens_.size() * static_cast<size_t>(c_.vocab_size), 0);
    for (const Span& span : last) {
      for (int64_t i = 0; i <= span.begin; ++i) {
        seen(span.sequence)[tokens_[static_cast<size_t>(span.sequence)][static_cast<size_t>(i)]] =
            1;
      }
    }
  }

  void draw(const std::vector<Span>& next, Tokens& drawn) override {
    const VerbMeter::Timed timed(meter_, "draw");
    drawn.clear();
    for (const Span& span : next) {
      uint8_t* flags = seen_.empty() ? nullptr : seen(span.sequence);
      drawn.push_back(sampler_.draw(logits() + span.sequence * c_.vocab_size, c_.vocab_size,
                                    sampling_, flags, span.sequence, span.begin));
      if (flags) flags[drawn.back()] = 1;
      write_tokens(span.sequence, span.begin, &drawn.back(), 1);
    }
  }

  void meter(VerbMeter* to) override { meter_ = to; }

 private:
  // CBLAS takes buffers of its own when first used on a size; after this, memory is constant.
  void warm_up() {
    x_ = base_ + w_.history;
    rows_ = plan_.piece_rows();
    std::memset(x_, 0, row_bytes(rows_));
    std::memset(base_ + w_.output, 0, row_bytes(rows_));
    finish(layers_.front());
  }

  const Layer& layer(const Verb& verb) const {
    return layers_[static_cast<size_t>(verb.block * c_.block_depth + verb.layer)];
  }

  size_t row_bytes(int64_t rows) const {
    return static_cast<size_t>(rows * c_.hidden_size) * sizeof(float);
  }
  // The stored stream serves one sequence at a time, from its position 0.
  char* stream() const {
    return arena_ + plan_.find("stream")->offset + row_bytes(spans_->front().begin);
  }

  uint8_t* seen(int64_t sequence) { return seen_.data() + sequence * c_.vocab_size; }

  void embed() {
    int64_t first = 0;
    for (const Span& span : *spans_) {
      const int64_t rows = span.rows;
      const int32_t* tokens = tokens_[static_cast<size_t>(span.sequence)].data() + span.begin;
#pragma omp parallel for num_threads(threads_) schedule(static) if (rows > 8)
      for (int64_t row = 0; row < rows; ++row) {
        float* to = x_ + (first + row) * c_.hidden_size;
        const int64_t offset = tokens[row] * c_.hidden_size;
        if (dtype_ == DType::bfloat16) {
          kernels().b16.widen(static_cast<const bf16*>(embed_.data) + offset, c_.hidden_size, to);
        } else {
          std::memcpy(to, static_cast<const float*>(embed_.data) + offset, row_bytes(1));
        }
      }
      first += rows;
    }
  }

  void keep() {
    const Span& span = spans_->front();
    const int64_t first = span.history - span.compressed;  // position of the stream's row 0
    const int64_t skip = std::max<int64_t>(0, first - span.begin);
    if (skip >= span.rows) return;
    std::memcpy(base_ + w_.compressed + (span.begin + skip - first) * c_.hidden_size,
                x_ + skip * c_.hidden_size, row_bytes(span.rows - skip));
  }

  void norm(const std::vector<float>& weight, const std::vector<float>& bias) {
    float* to = base_ + w_.normed;
#pragma omp parallel for num_threads(threads_) schedule(static) if (rows_ > 8)
    for (int64_t row = 0; row < rows_; ++row) {
      kernels().layer_norm(x_ + row * c_.hidden_size, weight.data(), bias.data(),
                           static_cast<float>(c_.layer_norm_eps), c_.hidden_size,
                           to + row * c_.hidden_size);
    }
  }

  void project(const Verb& verb) {
    const Layer& layer = this->layer(verb);
    norm(layer.attn_norm_weight, layer.attn_norm_bias);
    const int64_t dq = c_.query_dim(), dkv = c_.kv_dim();
    const int64_t begin = verb.queries ? 0 : dq;
    const int64_t columns = (verb.keys_values ? dq + 2 * dkv : dq) - begin;
    float* wide = base_ + w_.wide;
    dense_(layer.qkv, begin, begin + columns, base_ + w_.normed, rows_, false, wide, columns);
    if (verb.queries) {
      const float scale = kScoreScale / std::sqrt(static_cast<float>(c_.head_dim()));
#pragma omp parallel for num_threads(threads_) schedule(static) if (rows_ > 8)
      for (int64_t i = 0; i < rows_; ++i) {
        rope_.rotate(wide + i * columns, base_ + w_.rope + i * c_.head_dim(),
                     c_.num_attention_heads, scale, base_ + w_.query + i * dq);
      }
    }
    if (!verb.keys_values) return;
    int64_t row = 0;
    for (const Span& span : *spans_) {
      const float* from = wide + row * columns + dq - begin;
      const float* angles = base_ + w_.rope + row * c_.head_dim();
      cache_.write(*verb.keys_values, verb, span, rope_, angles, from, columns);
      row += span.rows;
    }
  }

  void attend(const Verb& verb, const Poll& poll) {
    queries_.clear();
    int64_t row = 0;
    for (const Span& span : *spans_) {
      Queries queries;
      queries.q = base_ + w_.query + row * c_.query_dim();
      queries.out = base_ + w_.output + row * c_.query_dim();
      queries.rows = span.rows;
      if (verb.causal) queries.keys[0] = cache_.read(Cache::window, verb, span);
      if (verb.context) queries.keys[1] = cache_.read(*verb.context, verb, span);
      queries_.push_back(queries);
      row += span.rows;
    }
    if (rows_ == static_cast<int64_t>(queries_.size())) return attend_.one_row_each(queries_);
    for (const Queries& queries : queries_) attend_.many_rows(queries, poll);
  }

  void finish(const Layer& layer) {
    const int64_t f = c_.intermediate_size;
    dense_(layer.out, base_ + w_.output, rows_, true, x_);
    norm(layer.mlp_norm_weight, layer.mlp_norm_bias);
    float* gate = base_ + w_.wide;
    float* up = gate + rows_ * f;
    dense_(layer.gate, base_ + w_.normed, rows_, false, gate);
    dense_(layer.up, base_ + w_.normed, rows_, false, up);
#pragma omp parallel for num_threads(threads_) schedule(static) if (rows_ > 8)
    for (int64_t row = 0; row < rows_; ++row) {
      kernels().silu_mul(gate + row * f, up + row * f, f);
    }
    dense_(layer.down, gate, rows_, true, x_);
  }

  void head() {
    float* normed = base_ + w_.normed;
    int64_t row = -1;
    int64_t next = 0;
    for (const Span& span : *spans_) {
      row += span.rows;
      kernels().layer_norm(x_ + row * c_.hidden_size, norm_weight_.data(), norm_bias_.data(),
                           static_cast<float>(c_.layer_norm_eps), c_.hidden_size,
                           normed + next++ * c_.hidden_size);
    }
    // Rows of the logits belong to sequences; consecutive ones share a pass over the matrix.
    for (int64_t first = 0; first < next;) {
      const int64_t sequence = (*spans_)[static_cast<size_t>(first)].sequence;
      int64_t count = 1;
      while (first + count < next &&
             (*spans_)[static_cast<size_t>(first + count)].sequence == sequence + count) {
        ++count;
      }
      dense_(embed_, normed + first * c_.hidden_size, count, false,
             base_ + w_.logits + sequence * c_.vocab_size);
      first += count;
    }
  }

  const Config c_;
  const CachePlan plan_;
  char* arena_;
  DType dtype_;
  int threads_;
  Workspace w_;
  float* base_;
  Dense dense_;
  KeyValueCache cache_;
  Rope rope_;
  Attend attend_;
  Sampler sampler_;
  SamplingParams sampling_;
  std::vector<uint8_t> seen_;   // (batch, V): in the sequence already; empty without a penalty
  std::vector<Tokens> tokens_;  // by sequence
  Matrix embed_;
  std::vector<float> norm_weight_, norm_bias_;
  std::vector<Layer> layers_;

  VerbMeter* meter_ = nullptr;
  const std::vector<Span>* spans_ = nullptr;  // of the run under way
  std::vector<Queries> queries_;
  float* x_ = nullptr;
  int64_t rows_ = 0;
};

}  // namespace
}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(const Config& config, const Weights& weights,
                                          const CachePlan& plan, Arena arena,
                                          const EngineOptions& options) {
  return std::make_unique<cpu::CpuBackend>(config, weights, plan, arena, options);
}

}  // namespace tlinformer
