// When a token is a hit and when the history slides; program.cpp states what either does.
#include "tlinformer/engine.h"

#include <algorithm>
#include <numeric>

#include "backend.h"
#include "meter.h"

namespace tlinformer {

struct Engine::Impl {
  struct Sequence {
    Tokens tokens;              // cached so far
    int64_t slid_history = 0;   // history that the cache is compressed for; kStale: redo it
    int64_t known_history = 0;  // rows of block 0's history that are cached
  };
  static constexpr int64_t kStale = -1;

  Config config;
  CachePlan plan;
  Stage window;
  Program slide_stages;
  std::unique_ptr<Backend> backend;
  std::vector<Sequence> sequences;
  std::vector<Span> spans;  // of the call under way; kept so that a hit allocates nothing
  std::vector<const int32_t*> span_tokens;
  std::vector<int64_t> everyone;  // 0 ... active - 1
  int64_t active = 0;
  EngineStats stats;

  Span span_of(int64_t sequence, int64_t begin, int64_t rows, int64_t history) const {
    return {sequence, begin, rows, history, config.compressed_rows(history)};
  }

  void run(const Stage& stage, const std::vector<Span>& over, Meter& meter) {
    span_tokens.clear();
    for (const Span& span : over) {
      const Sequence& sequence = sequences[static_cast<size_t>(span.sequence)];
      span_tokens.push_back(sequence.tokens.data() + span.begin);
    }
    double whole = 0;
    for (const Span& span : over) whole += cost(config, stage, span);
    backend->run(stage, over, span_tokens,
                 [&meter, whole](double share) { meter.poll(share * whole); });
    meter.done += whole;
  }

  // Rows of the history that a slide's stage covers: the first stage only the unknown ones.
  Span slide_span(size_t stage, int64_t index, int64_t history) const {
    const Sequence& sequence = sequences[static_cast<size_t>(index)];
    if (slide_stages[stage].scope == Scope::compressed) {
      const int64_t rows = config.compressed_rows(history);
      return span_of(index, history - rows, rows, history);
    }
    const int64_t begin = stage == 0 ? std::min(sequence.known_history, history) : 0;
    return span_of(index, begin, history - begin, history);
  }

  double slide_cost(int64_t index, int64_t history) const {
    double sum = 0;
    for (size_t i = 0; i < slide_stages.size(); ++i) {
      sum += cost(config, slide_stages[i], slide_span(i, index, history));
    }
    return sum;
  }

  void slide(int64_t index, int64_t history, Meter& meter) {
    Sequence& sequence = sequences[static_cast<size_t>(index)];
    sequence.slid_history = kStale;  // until done: an interruption then costs only time
    for (size_t i = 0; i < slide_stages.size(); ++i) {
      const Span all = slide_span(i, index, history);
      for (const Span& piece : pieces_of(slide_stages[i], all, plan.piece_rows())) {
        run(slide_stages[i], {piece}, meter);
        meter.poll();
      }
    }
    sequence.known_history = std::max(sequence.known_history, history);
    sequence.slid_history = history;
    ++stats.slides;
  }

  void prefill(const std::vector<Tokens>& prompts, const Progress& progress) {
    const CachePlanOptions& options = plan.options();
    require(!prompts.empty() && static_cast<int64_t>(prompts.size()) <= options.batch_size,
            "prefill got ", prompts.size(), " prompts; this engine holds 1 to ", options.batch_size,
            " sequences (batch_size)");
    for (size_t i = 0; i < prompts.size(); ++i) {
      const int64_t length = static_cast<int64_t>(prompts[i].size());
      require(length > 0, "prompt ", i, " is empty; a prompt needs at least one token");
      require(length <= options.max_context, "prompt ", i, " has ", length,
              " tokens; this engine was planned for max_context = ", options.max_context);
      check_tokens(prompts[i], "prompt ", i);
    }
    forget();
    Meter meter{&progress};
    std::vector<Span> windows;
    for (size_t i = 0; i < prompts.size(); ++i) {
      sequences[i].tokens = prompts[i];
      sequences[i].tokens.reserve(static_cast<size_t>(options.max_context));
      const int64_t length = static_cast<int64_t>(prompts[i].size());
      const int64_t history = config.history_at(length - 1);
      windows.push_back(span_of(static_cast<int64_t>(i), history, length - history, history));
      meter.total += slide_cost(windows.back().sequence, history);
      meter.total += cost(config, window, windows.back());
    }
    try {
      for (const Span& last : windows) {
        if (last.history > 0) slide(last.sequence, last.history, meter);
        run(window, {last}, meter);
        sequences[static_cast<size_t>(last.sequence)].known_history = last.begin + last.rows;
        stats.prefill_tokens += last.begin + last.rows;
      }
      active = static_cast<int64_t>(prompts.size());
      everyone.resize(prompts.size());
      std::iota(everyone.begin(), everyone.end(), int64_t{0});
      meter.poll(meter.total);
    } catch (...) {
      forget();
      throw;
    }
  }

  // Pushes one token onto each of the listed sequences.
  void push(const std::vector<int64_t>& listed, const Tokens& tokens, const Progress& progress) {
    Meter meter{&progress};
    for (int64_t index : listed) {  // slides first, so that a failure leaves every token unpushed
      const Sequence& sequence = sequences[static_cast<size_t>(index)];
      const int64_t history = config.history_at(static_cast<int64_t>(sequence.tokens.size()));
      if (history == sequence.slid_history) continue;
      meter.total = slide_cost(index, history);
      meter.done = 0;
      slide(index, history, meter);
    }
    spans.clear();
    for (size_t i = 0; i < listed.size(); ++i) {
      Sequence& sequence = sequences[static_cast<size_t>(listed[i])];
      const int64_t position = static_cast<int64_t>(sequence.tokens.size());
      sequence.tokens.push_back(tokens[i]);
      sequence.known_history = std::max(sequence.known_history, position + 1);
      spans.push_back(span_of(listed[i], position, 1, config.history_at(position)));
    }
    const Progress none;  // a hit is too short to interrupt
    Meter unmetered{&none};
    run(window, spans, unmetered);
    count_hits();
  }

  void count_hits() {
    for (const Span& span : spans) {
      stats.hits += span.begin > span.history;  // the first token of a window is a slide's
      for (const Verb& verb : window.verbs) {
        if (verb.kind != Verb::Kind::attend) continue;
        stats.rows_read += span.begin + 1 - span.history + keys_read(verb, span);
      }
    }
  }

  template <class... Where>
  void check_tokens(const Tokens& tokens, const Where&... where) const {
    for (int32_t token : tokens) {
      require(token >= 0 && token < config.vocab_size, where..., ": token id ", token,
              " is outside the vocabulary, 0 to ", config.vocab_size - 1);
    }
  }

  void check_ready(const char* call) const {
    require(active > 0, call, " needs a prefill first: the engine is empty");
  }

  void check_room(int64_t tokens) const {
    for (int64_t i = 0; i < active; ++i) {
      const int64_t held = static_cast<int64_t>(sequences[static_cast<size_t>(i)].tokens.size());
      require(tokens <= plan.options().max_context - held, "sequence ", i, " holds ", held,
              " tokens and cannot take ", tokens,
              " more: max_context = ", plan.options().max_context,
              "; create the engine with a larger one or ask for fewer tokens");
    }
  }

  void forget() {
    for (Sequence& sequence : sequences) {
      sequence.tokens.clear();
      sequence.slid_history = 0;
      sequence.known_history = 0;
    }
    active = 0;
  }
};

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
  impl_->window = window_program(config);
  impl_->slide_stages = slide_program(config);
  impl_->backend = make_cpu_backend(config, weights, plan, arena, options);
  const size_t batch = static_cast<size_t>(plan.options().batch_size);
  impl_->sequences.resize(batch);
  impl_->spans.reserve(batch);
  impl_->span_tokens.reserve(batch);
}

Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

void Engine::prefill(const std::vector<Tokens>& prompts, const Progress& progress) {
  impl_->prefill(prompts, progress);
}

void Engine::step(const Tokens& tokens, const Progress& progress) {
  impl_->check_ready("step");
  require(static_cast<int64_t>(tokens.size()) == impl_->active, "step got ", tokens.size(),
          " tokens for ", impl_->active, " sequences; it takes one each");
  impl_->check_tokens(tokens, "step");
  impl_->check_room(1);
  impl_->push(impl_->everyone, tokens, progress);
}

std::vector<Tokens> Engine::generate(int64_t max_new_tokens, const SamplingParams& sampling,
                                     const TokenSink& sink, const Progress& progress) {
  Impl& impl = *impl_;
  impl.check_ready("generate");
  require(max_new_tokens >= 0, "max_new_tokens = ", max_new_tokens, "; it must be at least 0");
  sampling.validate(impl.config.vocab_size);
  impl.check_room(max_new_tokens);
  const size_t count = static_cast<size_t>(impl.active);
  const size_t vocab = static_cast<size_t>(impl.config.vocab_size);
  std::vector<Tokens> out(count);
  std::vector<uint8_t> seen(sampling.repetition_penalty == 1.0 ? 0 : count * vocab, 0);
  std::vector<int64_t> live = impl.everyone;
  Tokens drawn(count);
  for (size_t i = 0; i < count; ++i) {
    out[i].reserve(static_cast<size_t>(max_new_tokens));
    if (seen.empty()) continue;
    for (int32_t token : impl.sequences[i].tokens) seen[i * vocab + static_cast<size_t>(token)] = 1;
  }
  const auto stops = [&](int32_t token) {
    const Tokens& ids = sampling.stop_token_ids;
    return std::find(ids.begin(), ids.end(), token) != ids.end();
  };
  bool wanted = true;
  for (int64_t n = 0; n < max_new_tokens && wanted && !live.empty(); ++n) {
    for (size_t row = 0; row < live.size(); ++row) {
      const size_t i = static_cast<size_t>(live[row]);
      uint8_t* flags = seen.empty() ? nullptr : seen.data() + i * vocab;
      drawn[row] = impl.backend->sample(live[row], sampling, flags,
                                        static_cast<int64_t>(impl.sequences[i].tokens.size()));
      if (flags) flags[drawn[row]] = 1;
      out[i].push_back(drawn[row]);
      // Delivered before it is pushed: nobody waits for a slide to see what was drawn before it.
      if (sink && !sink(live[row], drawn[row])) wanted = false;
    }
    impl.push(live, drawn, progress);
    size_t kept = 0;
    for (size_t row = 0; row < live.size(); ++row) {
      if (!stops(drawn[row])) live[kept++] = live[row];
    }
    live.resize(kept);
  }
  return out;
}

const float* Engine::logits() const {
  impl_->check_ready("logits");
  return impl_->backend->logits();
}

EngineStats Engine::stats() const {
  EngineStats stats = impl_->stats;
  stats.cache_bytes = impl_->plan.cache_bytes();
  for (int64_t i = 0; i < impl_->active; ++i) {
    const Impl::Sequence& sequence = impl_->sequences[static_cast<size_t>(i)];
    const int64_t held = static_cast<int64_t>(sequence.tokens.size());
    const int64_t history = impl_->config.history_at(held - 1);
    stats.history_length.push_back(history);
    stats.window_fill.push_back(held - history);
  }
  return stats;
}

void Engine::reset() {
  impl_->forget();
  impl_->stats = {};
}

int64_t Engine::sequences() const { return impl_->active; }
const Config& Engine::config() const { return impl_->config; }
const CachePlan& Engine::plan() const { return impl_->plan; }
}  // namespace tlinformer
