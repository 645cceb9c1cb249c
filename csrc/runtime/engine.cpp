// The public face of engine_impl.h: what calls check, and the loop of generate.
#include "tlinformer/engine.h"

#include <algorithm>

#include "engine_impl.h"
#include "threads.h"

namespace tlinformer {

namespace {

std::unique_ptr<Backend> make_backend(const Config& config, const Weights& weights,
                                      const CachePlan& plan, Arena arena,
                                      const EngineOptions& options) {
#if defined(TLINFORMER_CUDA)
  if (plan.options().device == Device::cuda) {
    return make_cuda_backend(config, weights, plan, arena, options);
  }
#endif
  return make_cpu_backend(config, weights, plan, arena, options);
}

}  // namespace

Engine::Engine(const Config& config, const Weights& weights, const CachePlan& plan, Arena arena,
               const EngineOptions& options)
    : impl_(std::make_unique<Impl>()) {
  require(CachePlan::make(config, plan.options()).total_bytes() == plan.total_bytes(),
          "the cache plan was made for another config");
  require(static_cast<int64_t>(weights.layers.size()) == config.num_layers(), "got weights of ",
          weights.layers.size(), " layers; the config has ", config.num_layers());
  require(arena.data != nullptr && arena.bytes >= plan.total_bytes(), "the arena holds ",
          arena.bytes, " bytes; the plan needs ", plan.total_bytes());
  require(reinterpret_cast<uintptr_t>(arena.data) % 64 == 0,
          "the arena must be aligned to 64 bytes");
  impl_->config = config;
  impl_->plan = plan;
  impl_->weights = weights;
  impl_->arena = static_cast<char*>(arena.data);
  impl_->threads = threads_of(options);
  impl_->window = window_program(config);
  impl_->blocks = window_blocks(config);
  impl_->slide_stages = slide_program(config);
  impl_->backend = make_backend(config, weights, plan, arena, options);
  const size_t batch = static_cast<size_t>(plan.options().batch_size);
  impl_->sequences.resize(batch);
  impl_->spans.reserve(batch);
}

Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

void Engine::prefill(const std::vector<Tokens>& prompts, const Progress& progress) {
  std::vector<TokenIds> ids;
  for (const Tokens& prompt : prompts) {
    ids.push_back({prompt.data(), static_cast<int64_t>(prompt.size())});
  }
  prefill(ids.data(), static_cast<int64_t>(ids.size()), progress);
}

void Engine::prefill(const TokenIds* prompts, int64_t count, const Progress& progress) {
  impl_->prefill(prompts, count, progress);
}

void Engine::step(const Tokens& tokens, const Progress& progress) {
  impl_->check_ready("step");
  require(static_cast<int64_t>(tokens.size()) == impl_->active, "step got ", tokens.size(),
          " tokens for ", impl_->active, " sequences; it takes one each");
  for (int32_t token : tokens) require_token(token, impl_->config.vocab_size, "step");
  impl_->check_room(1);
  impl_->aim(impl_->everyone);
  for (const Span& next : impl_->spans) {
    const int32_t* token = tokens.data() + next.sequence;
    impl_->backend->write_tokens(next.sequence, next.begin, token, 1);
  }
  impl_->push(progress);
}

std::vector<Tokens> Engine::generate(int64_t max_new_tokens, const SamplingParams& sampling,
                                     const TokenSink& sink, const Progress& progress) {
  Impl& impl = *impl_;
  impl.check_ready("generate");
  require(max_new_tokens >= 0, "max_new_tokens = ", max_new_tokens, "; it must be at least 0");
  sampling.validate(impl.config.vocab_size);
  impl.check_room(max_new_tokens);
  const Range range("generate", max_new_tokens);
  std::vector<Tokens> out(static_cast<size_t>(impl.active));
  for (Tokens& tokens : out) tokens.reserve(static_cast<size_t>(max_new_tokens));
  const auto stops = [&](int32_t token) {
    const Tokens& ids = sampling.stop_token_ids;
    return std::find(ids.begin(), ids.end(), token) != ids.end();
  };
  std::vector<int64_t> live = impl.everyone;
  Tokens drawn;
  impl.backend->begin(sampling, impl.last_tokens());
  struct End {  // also after an exception
    Impl& impl;
    ~End() { impl.backend->end(impl.last_tokens()); }
  } end{impl};
  bool wanted = true;
  int64_t expected = 0;
  for (int64_t n = 0; n < max_new_tokens && wanted && !live.empty(); ++n) {
    impl.aim(live);
    if (expected == 0) {
      expected = impl.until_slide(max_new_tokens - n);
      impl.backend->expect(expected);
    }
    if (expected > 0) --expected;
    {
      const Range draws("draw", impl.spans.front().begin);
      if (impl.verbs.on) impl.verbs.count("draw", impl.work_of_draw());
      impl.backend->draw(impl.spans, drawn);
    }
    for (size_t row = 0; row < live.size(); ++row) {
      out[static_cast<size_t>(live[row])].push_back(drawn[row]);
      // Delivered before it is pushed: nobody waits for a slide to see what was drawn before it.
      if (sink && !sink(live[row], drawn[row])) wanted = false;
    }
    impl.push(progress);
    size_t kept = 0;
    for (size_t row = 0; row < live.size(); ++row) {
      if (!stops(drawn[row])) live[kept++] = live[row];
    }
    live.resize(kept);
  }
  return out;
}

void Engine::save_state(const std::string& path, const std::vector<int64_t>& chosen,
                        const Progress& progress) {
  impl_->check_ready("save_state");
  const Range range("save_state", impl_->active);
  impl_->save(path, chosen, progress);
}

void Engine::load_state(const std::string& path, const std::vector<int64_t>& chosen,
                        const Progress& progress) {
  const Range range("load_state");
  impl_->load(path, chosen, progress);
}

const float* Engine::logits() const {
  impl_->check_ready("logits");
  return impl_->backend->logits();
}

void Engine::copy_logits(float* to) const {
  impl_->check_ready("copy_logits");
  impl_->backend->copy_logits(to, impl_->active);
}

EngineStats Engine::stats() const {
  EngineStats stats = impl_->stats;
  stats.cache_bytes = impl_->plan.cache_bytes();
  for (int64_t i = 0; i < impl_->active; ++i) {
    const int64_t held = impl_->sequences[static_cast<size_t>(i)].length;
    const int64_t history = impl_->config.history_at(held - 1);
    stats.history_length.push_back(history);
    stats.window_fill.push_back(held - history);
  }
  return stats;
}

void Engine::meter(bool on) {
  impl_->verbs = {on, {}};
  impl_->backend->meter(&impl_->verbs);
}
const std::vector<VerbStats>& Engine::metered() const { return impl_->verbs.rows; }

void Engine::reset() {
  impl_->forget();
  impl_->stats = {};
}

int64_t Engine::sequences() const { return impl_->active; }
const Config& Engine::config() const { return impl_->config; }
const CachePlan& Engine::plan() const { return impl_->plan; }
}  // namespace tlinformer
