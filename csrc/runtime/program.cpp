// The architecture, in verbs: what new tokens do, and what a slide does (paper section 3).
#include <algorithm>
#include <optional>
#include <utility>

#include "backend.h"

namespace tlinformer {
namespace {

using Kind = Verb::Kind;
constexpr std::nullopt_t kNothing = std::nullopt;

Verb project(int block, int layer, bool queries, std::optional<Cache> keys_values) {
  return {Kind::project, block, layer, queries, false, keys_values, kNothing};
}

Verb attend(int block, int layer, bool causal, std::optional<Cache> context) {
  return {Kind::attend, block, layer, false, causal, kNothing, context};
}

}  // namespace

// New tokens through every layer. With one row per sequence this is a hit.
Stage window_program(const Config& config) {
  Stage stage{Scope::window, {{Kind::embed}}};
  for (int b = 0; b < config.num_blocks; ++b) {
    for (int l = 0; l < config.block_depth; ++l) {
      std::optional<Cache> context = Cache::context;
      if (l == 0) context = Cache::history;
      if (l == 0 && config.variant == Variant::tconstformer) context = kNothing;
      stage.verbs.push_back(project(b, l, true, Cache::window));
      stage.verbs.push_back(attend(b, l, true, context));
      stage.verbs.push_back({Kind::finish, b, l});
    }
  }
  stage.verbs.push_back({Kind::head});
  return stage;
}

Program window_blocks(const Config& config) {
  Program blocks(static_cast<size_t>(config.num_blocks), {Scope::window, {}});
  for (const Verb& verb : window_program(config).verbs) {
    const bool last = verb.kind == Kind::head;
    (last ? blocks.back() : blocks[static_cast<size_t>(verb.block)]).verbs.push_back(verb);
  }
  return blocks;
}

// The compressed history anew. Its first stage covers only history that block 0 has not seen yet:
// after hits there is none, because their window keys and values already lie where history goes.
Program slide_program(const Config& config) {
  const int blocks = static_cast<int>(config.num_blocks);
  const int restore = static_cast<int>(config.block_depth) - 1;
  Program program{{Scope::history, {{Kind::embed}, project(0, 0, false, Cache::history)}}};
  for (int b = 0; b < blocks; ++b) {
    Stage compressed{Scope::compressed, {}};
    std::vector<Verb>& z = compressed.verbs;
    if (b == 0) z.push_back({Kind::embed});  // later blocks: kept by the restore stage below
    z.push_back(project(b, 0, true, kNothing));
    z.push_back(attend(b, 0, false, Cache::history));
    z.push_back({Kind::finish, b, 0});
    for (int l = 1; l < restore; ++l) {
      z.push_back(project(b, l, true, Cache::context));
      z.push_back(attend(b, l, false, Cache::context));
      z.push_back({Kind::finish, b, l});
    }
    z.push_back(project(b, restore, false, Cache::context));
    program.push_back(std::move(compressed));
    if (b + 1 == blocks) break;  // nobody reads what the last block would restore

    Stage restored{Scope::history, {}};
    std::vector<Verb>& a = restored.verbs;
    a.push_back({b == 0 ? Kind::embed : Kind::load});
    a.push_back(project(b, 0, true, kNothing));
    a.push_back(attend(b, restore, false, Cache::context));
    a.push_back({Kind::finish, b, restore});
    if (b + 2 < blocks) a.push_back({Kind::store});
    a.push_back({Kind::keep});
    a.push_back(project(b + 1, 0, false, Cache::history));
    program.push_back(std::move(restored));
  }
  return program;
}

Slots slots_of(const CachePlan& plan, Cache cache, int block, int layer, const Span& span) {
  const int64_t end = span.begin + span.rows;
  switch (cache) {
    case Cache::history:
      return {plan.find("history", block, layer), 0, span.history, 0};
    case Cache::context: {
      const int64_t base = span.history - span.compressed;
      return {plan.find("context", block, layer), 0, span.compressed, base};
    }
    case Cache::window:
      break;
  }
  // Block 0's window continues its history, which is what lets a slide append without a copy.
  if (block == 0 && layer == 0) {
    return {plan.find("history", 0, 0), span.history, end - span.history, 0};
  }
  return {plan.find("window", block, layer), 0, end - span.history, span.history};
}

std::vector<Span> pieces_of(const Stage& stage, const Span& all, int64_t most) {
  if (stage.scope != Scope::history) return {all};
  // The fewest pieces, all about as large: a small rest would run at a fraction of the speed.
  const int64_t count = std::max<int64_t>(1, (all.rows + most - 1) / most);
  const int64_t rows = std::min(most, ((all.rows + count - 1) / count + 15) / 16 * 16);
  std::vector<Span> pieces;
  for (int64_t done = 0; done < all.rows; done += rows) {
    pieces.push_back(all);
    pieces.back().begin += done;
    pieces.back().rows = std::min(rows, all.rows - done);
  }
  return pieces;
}

int64_t keys_read(const Verb& verb, const Span& span) {
  if (!verb.context) return 0;
  return *verb.context == Cache::history ? span.history : span.compressed;
}

const char* name_of(const Verb& verb) {
  switch (verb.kind) {
    case Kind::embed:
      return "embed";
    case Kind::load:
      return "load";
    case Kind::project:
      return "project";
    case Kind::attend:
      if (!verb.context) return "attend window";
      return *verb.context == Cache::history ? "attend history" : "attend context";
    case Kind::finish:
      return "finish";
    case Kind::store:
      return "store";
    case Kind::keep:
      return "keep";
    case Kind::head:
      return "head";
  }
  return "";
}

Work work_of(const Config& c, DType dtype, const Verb& verb, const Span* spans, size_t count) {
  const auto real = [](int64_t n) { return static_cast<double>(n); };
  const double element = real(size_of(dtype)), d = real(c.hidden_size), dq = real(c.query_dim());
  const double cached = 2 * real(c.kv_dim());  // numbers of a row of keys and values
  double rows = 0;
  for (size_t i = 0; i < count; ++i) rows += real(spans[i].rows);
  Work work;
  const auto product = [&](double weights, double times) {
    work.flops += 2 * weights * times;
    work.bytes += weights * element;
  };
  switch (verb.kind) {
    case Kind::embed:
      work.bytes = rows * d * element;
      break;
    case Kind::project:
      product(d * (verb.queries * dq + verb.keys_values.has_value() * cached), rows);
      work.bytes += verb.keys_values.has_value() * rows * cached * element;
      break;
    case Kind::finish:
      product(d * (dq + 3 * real(c.intermediate_size)), rows);
      break;
    case Kind::attend:
      for (size_t i = 0; i < count; ++i) {
        const Span& span = spans[i];
        const double before = verb.causal * real(span.begin - span.history);
        const double own = verb.causal * real(span.rows), context = real(keys_read(verb, span));
        const double pairs = real(span.rows) * (before + context) + own * (real(span.rows) + 1) / 2;
        work.flops += 4 * pairs * dq;
        work.bytes += (before + own + context) * cached * element;
      }
      break;
    case Kind::head:
      product(real(c.vocab_size) * d, static_cast<double>(count));
      break;
    default:  // copies of activations
      break;
  }
  return work;
}

double cost(const Config& config, const Stage& stage, const Span& span) {
  double flops = 0;
  for (const Verb& verb : stage.verbs) {
    flops += work_of(config, DType::float32, verb, &span, 1).flops;
  }
  return flops / 2;
}

}  // namespace tlinformer
