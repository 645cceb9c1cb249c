// What an engine does with its sequences: when a token is a hit and when the history slides;
// program.cpp states what either does.
#pragma once

#include <algorithm>
#include <numeric>

#include "backend.h"
#include "meter.h"
#include "prompts.h"
#include "range.h"
#include "state.h"
#include "tlinformer/engine.h"
#include "verb_meter.h"

namespace tlinformer {

struct Engine::Impl {
  struct Sequence {
    int64_t length = 0;         // tokens cached so far
    int64_t slid_history = 0;   // history that the cache is compressed for; kStale: redo it
    int64_t known_history = 0;  // rows of block 0's history that are cached
  };
  static constexpr int64_t kStale = -1;

  Config config;
  CachePlan plan;
  Weights weights;
  char* arena = nullptr;
  int threads = 1;          // that check long prompts
  std::string fingerprint;  // of the weights, once somebody asked
  Stage window;
  Program blocks;  // of the window
  Program slide_stages;
  std::unique_ptr<Backend> backend;
  std::vector<Sequence> sequences;
  std::vector<Span> spans;        // of the call under way; kept so that a hit allocates nothing
  std::vector<int64_t> everyone;  // 0 ... active - 1
  int64_t active = 0;
  EngineStats stats;
  VerbMeter verbs;

  Span span_of(int64_t sequence, int64_t begin, int64_t rows, int64_t history) const {
    return {sequence, begin, rows, history, config.compressed_rows(history)};
  }

  // The newest token of every sequence.
  std::vector<Span> last_tokens() const {
    std::vector<Span> last;
    for (int64_t index : everyone) {
      const int64_t position = sequences[static_cast<size_t>(index)].length - 1;
      last.push_back(span_of(index, position, 1, config.history_at(position)));
    }
    return last;
  }

  // The cost of a stage, whose verbs it counts.
  double count(const Stage& stage, const std::vector<Span>& over) {
    double whole = 0;
    for (const Span& span : over) whole += cost(config, stage, span);
    if (verbs.on) {
      for (const Verb& verb : stage.verbs) {
        const DType dtype = plan.options().dtype;
        verbs.count(name_of(verb), work_of(config, dtype, verb, over.data(), over.size()));
      }
    }
    return whole;
  }

  void run(const Stage& stage, const std::vector<Span>& over, Meter& meter) {
    const double whole = count(stage, over);
    backend->run(stage, over, [&meter, whole](double share) { meter.poll(share * whole); });
    meter.done += whole;
  }

  void run_pair(const Stage& compressed, const Span& history, const Stage& block, const Span& own,
                Meter& meter) {
    const double whole = count(compressed, {history}) + count(block, {own});
    backend->run_pair(compressed, history, block, own,
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

  // With a window, its rows go through each block as soon as the block's history is compressed.
  void slide(int64_t index, int64_t history, Meter& meter, const Span* own = nullptr) {
    const Range range("slide", history);
    Sequence& sequence = sequences[static_cast<size_t>(index)];
    sequence.slid_history = kStale;  // until done: an interruption then costs only time
    size_t block = 0;
    for (size_t i = 0; i < slide_stages.size(); ++i) {
      const Span all = slide_span(i, index, history);
      for (const Span& piece : pieces_of(slide_stages[i], all, plan.piece_rows())) {
        const Range range("piece", piece.begin);
        if (own && slide_stages[i].scope == Scope::compressed) {
          run_pair(slide_stages[i], piece, blocks[block++], *own, meter);
        } else {
          run(slide_stages[i], {piece}, meter);
        }
        meter.poll();
      }
    }
    sequence.known_history = std::max(sequence.known_history, history);
    sequence.slid_history = history;
    ++stats.slides;
  }

  void prefill(const TokenIds* prompts, int64_t count, const Progress& progress) {
    const Range range("prefill", count);
    Prompts taken(prompts, count, config, plan, threads, *backend);
    forget();
    Meter meter{&progress};
    std::vector<Span> windows;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t length = prompts[i].count;
      sequences[static_cast<size_t>(i)].length = length;
      taken.write(i);
      const int64_t history = config.history_at(length - 1);
      windows.push_back(span_of(i, history, length - history, history));
      meter.total += slide_cost(windows.back().sequence, history);
      meter.total += cost(config, window, windows.back());
    }
    try {
      for (const Span& last : windows) {
        const bool together = last.history > 0 && last.rows > 1;  // one row is like a step's
        if (last.history > 0) slide(last.sequence, last.history, meter, together ? &last : nullptr);
        if (!together) run(window, {last}, meter);
        sequences[static_cast<size_t>(last.sequence)].known_history = last.begin + last.rows;
        stats.prefill_tokens += last.begin + last.rows;
      }
      activate(static_cast<size_t>(count));
      ++stats.prefills;
      meter.poll(meter.total);
    } catch (...) {
      forget();
      throw;
    }
  }

  // The next token of each of the listed sequences.
  void aim(const std::vector<int64_t>& listed) {
    spans.clear();
    for (int64_t index : listed) {
      const int64_t position = sequences[static_cast<size_t>(index)].length;
      spans.push_back(span_of(index, position, 1, config.history_at(position)));
    }
  }

  bool slides(const Span& next) const {
    return next.history != sequences[static_cast<size_t>(next.sequence)].slid_history;
  }

  // Pushes the tokens of `spans`, which the backend holds already.
  void push(const Progress& progress) {
    Meter meter{&progress};
    for (const Span& next : spans) {  // slides first, so that a failure leaves every token unpushed
      if (!slides(next)) continue;
      meter.total = slide_cost(next.sequence, next.history);
      meter.done = 0;
      slide(next.sequence, next.history, meter);
    }
    const Range range("step", spans.front().begin);
    const Progress none;  // a hit is too short to interrupt
    Meter unmetered{&none};
    run(window, spans, unmetered);
    for (const Span& pushed : spans) {
      Sequence& sequence = sequences[static_cast<size_t>(pushed.sequence)];
      sequence.length = pushed.begin + 1;
      sequence.known_history = std::max(sequence.known_history, pushed.begin + 1);
    }
    count_hits();
  }

  Work work_of_draw() const {  // it reads the logits
    return {0, static_cast<double>(spans.size()) * static_cast<double>(config.vocab_size) * 4};
  }

  // How many tokens each of `spans` can take before the first of them slides.
  int64_t until_slide(int64_t most) const {
    for (const Span& next : spans) {
      if (slides(next)) return 0;
      most = std::min(most, next.history + config.generation_window - next.begin);
    }
    return most;
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

  void check_ready(const char* call) const {
    require(active > 0, call, " needs a prefill first: the engine is empty");
  }

  void check_room(int64_t tokens) const {
    for (int64_t i = 0; i < active; ++i) {
      const int64_t held = sequences[static_cast<size_t>(i)].length;
      require(tokens <= plan.options().max_context - held, "sequence ", i, " holds ", held,
              " tokens and cannot take ", tokens,
              " more: max_context = ", plan.options().max_context,
              "; create the engine with a larger one or ask for fewer tokens");
    }
  }

  void activate(size_t count) {
    active = static_cast<int64_t>(count);
    everyone.resize(count);
    std::iota(everyone.begin(), everyone.end(), int64_t{0});
  }

  StateHolder holder() {
    if (fingerprint.empty()) fingerprint = fingerprint_of(config, weights, *backend);
    return {config, plan, arena, *backend, fingerprint};
  }

  void save(const std::string& path, const std::vector<int64_t>& chosen, const Progress& progress) {
    std::vector<HeldSequence> held;
    for (int64_t index : chosen.empty() ? everyone : chosen) {
      require(index >= 0 && index < active, "save_state: there is no sequence ", index,
              "; the engine holds ", active, ", from 0 on");
      held.push_back({index, sequences[static_cast<size_t>(index)].length});
    }
    save_sequences(holder(), path, held, progress);
  }

  void load(const std::string& path, const std::vector<int64_t>& chosen, const Progress& progress) {
    const StateHolder own = holder();
    const SavedState saved(own, path, chosen, progress);
    const std::vector<int64_t> lengths = saved.lengths();
    forget();
    saved.restore(progress);
    for (size_t i = 0; i < lengths.size(); ++i) {
      // A window that is full was not saved, and its slide is still to come.
      const bool full = lengths[i] % config.generation_window == 0;
      const int64_t slid = full ? kStale : config.history_at(lengths[i] - 1);
      sequences[i] = {lengths[i], slid, lengths[i]};
    }
    activate(lengths.size());
  }

  void forget() {
    for (Sequence& sequence : sequences) sequence = {};
    everyone.clear();
    active = 0;
  }
};

}  // namespace tlinformer
