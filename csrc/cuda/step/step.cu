#include "step.h"

namespace tlinformer::cuda {

Step::Step(const Model& model, const Workspace& workspace, char* base)
    : m_(model), w_(workspace), base_(base), window_(window_program(model.c)) {
  sample_.dtype = m_.dtype;
  sample_.batch = static_cast<int>(m_.plan.options().batch_size);
  sample_.vocab_size = m_.vocab();
  sample_.hidden_size = m_.hidden();
  sample_.sampling = at<const DeviceSampling>(w_.sampling);
  sample_.logits = at<const float>(w_.logits);
  sample_.candidates = at<const Candidate>(w_.candidates);
  sample_.candidate_count = head_candidates(m_.vocab());
  sample_.state = at<SequenceState>(w_.state);
  sample_.seen = at<uint8_t>(w_.seen);
  sample_.stops = at<const uint8_t>(w_.stops);
  sample_.tokens = at<int32_t>(w_.tokens);
  sample_.token_stride = m_.plan.options().max_context;
  sample_.embed = m_.weights.embed_tokens;
  sample_.x = at<float>(w_.step_x);
  sample_.rope = m_.rope;
  sample_.pairs = m_.head_dim() / 2;
  sample_.rotations = at<float2>(w_.rotations);
  sample_.draws = at<int64_t>(w_.draws);
  sample_.scratch = at<void>(w_.sample);
}

void Step::set_ring(int32_t* ring, int64_t rows) {
  sample_.ring = ring;
  sample_.ring_rows = rows;
}

void Step::sample(const Launch& how) const { sample_step(sample_, how); }
void Step::feed(const Launch& how) const { feed_step(sample_, how); }

void Step::push(const Launch& first) const {
  Launch how = first;
  // Kernels that keep weights in shared memory run beside others that leave as much to it.
  if (sample_.batch == 1 && is_wide(m_.hidden())) how.shared_percent = kAllShared;
  const auto next = [&how] {
    const Launch now = how;
    how.early = true;
    return now;
  };
  Parts parts;
  for (const Verb& verb : window_.verbs) {
    switch (verb.kind) {
      case Verb::Kind::project:
        project(verb, parts, next());
        break;
      case Verb::Kind::attend:
        attend(verb, next());
        break;
      case Verb::Kind::finish:
        parts = finish(verb, parts, next());
        break;
      case Verb::Kind::head:
        head(parts, next());
        break;
      default:  // the sampler has stored x
        break;
    }
  }
}

void Step::project(const Verb& verb, const Parts& parts, const Launch& how) const {
  const LayerWeights& layer = m_.layer(verb);
  const CachedRows window = m_.rows(Cache::window, verb);
  auto p = of_rows<ProjectStep>();
  p.x = at<const float>(w_.step_x);
  p.parts = parts;
  p.hidden_size = m_.hidden();
  p.norm = m_.norm(layer.attn_norm_weight, layer.attn_norm_bias);
  p.weight = layer.qkv_proj_weight;
  p.bias = layer.qkv_proj_bias;
  p.query_heads = m_.heads();
  p.kv_heads = m_.kv_heads();
  p.head_dim = m_.head_dim();
  p.rotations = at<const float2>(w_.rotations);
  p.query = at<float>(w_.step_query);
  p.new_rows = {const_cast<void*>(window.keys), const_cast<void*>(window.values),
                window.sequence_stride, window.head_stride,
                Model::follows_history(Cache::window, verb)};
  project_step(p, how);
}

void Step::attend(const Verb& verb, const Launch& how) const {
  DecodeAttention a;
  a.dtype = m_.dtype;
  a.batch = static_cast<int>(m_.plan.options().batch_size);
  a.query_heads = m_.heads();
  a.kv_heads = m_.kv_heads();
  a.head_dim = m_.head_dim();
  a.query = at<const float>(w_.step_query);
  a.output = at<void>(w_.attended);
  a.state = at<const SequenceState>(w_.state);
  if (verb.context) {
    a.context_rows =
        *verb.context == Cache::history ? ContextRows::history : ContextRows::compressed;
    a.context = m_.rows(*verb.context, verb);
  }
  a.window = m_.rows(Cache::window, verb);
  a.window_follows_history = Model::follows_history(Cache::window, verb);
  const int64_t longest = m_.plan.options().max_context;
  const int64_t history = m_.c.history_at(longest - 1);
  a.most_window_rows = static_cast<int>(std::min(longest, m_.c.generation_window));
  a.most_rows = a.most_window_rows;
  if (verb.context) {
    a.most_rows += *verb.context == Cache::history ? history : m_.c.compressed_rows(history);
  }
  a.scratch = at<void>(w_.decode);
  decode_attention(a, how);
}

Parts Step::finish(const Verb& verb, const Parts& parts, const Launch& how) const {
  const LayerWeights& layer = m_.layer(verb);
  auto out = of_rows<AddStep>();
  out.input = at<const void>(w_.attended);
  out.weight = layer.out_proj_weight;
  out.bias = layer.out_proj_bias;
  out.inputs = static_cast<int>(m_.c.query_dim());
  out.outputs = m_.hidden();
  out.x = at<float>(w_.step_x);
  out.parts = parts;
  add_step(out, how);
  Launch next = how;
  next.early = true;
  return mlp(verb, next);
}

Parts Step::mlp(const Verb& verb, const Launch& how) const {
  const LayerWeights& layer = m_.layer(verb);
  auto p = of_rows<MlpStep>();
  p.x = at<const float>(w_.step_x);
  p.hidden_size = m_.hidden();
  p.intermediate_size = m_.inner();
  p.norm = m_.norm(layer.mlp_norm_weight, layer.mlp_norm_bias);
  p.gate = layer.gate_proj_weight;
  p.up = layer.up_proj_weight;
  p.down = layer.down_proj_weight;
  p.parts = at<float>(w_.parts);
  const int parts = p.batch == 1 ? mlp_parts(p) : 0;
  if (parts > 0) {
    mlp_row(p, how);
    return {p.parts, parts};
  }
  p.hidden = at<void>(w_.hidden);
  gate_step(p, how);
  auto down = of_rows<AddStep>();
  down.input = p.hidden;
  down.weight = p.down;
  down.inputs = p.intermediate_size;
  down.outputs = m_.hidden();
  down.x = at<float>(w_.step_x);
  Launch next = how;
  next.early = true;
  add_step(down, next);
  return {};
}

void Step::head(const Parts& parts, const Launch& how) const {
  auto p = of_rows<HeadStep>();
  p.x = at<const float>(w_.step_x);
  p.parts = parts;
  p.hidden_size = m_.hidden();
  p.vocab_size = m_.vocab();
  p.norm = m_.norm(m_.weights.norm_weight, m_.weights.norm_bias);
  p.embed = m_.weights.embed_tokens;
  p.logits = at<float>(w_.logits);
  p.candidates = at<Candidate>(w_.candidates);
  head_step(p, how);
}

}  // namespace tlinformer::cuda
