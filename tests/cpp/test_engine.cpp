// The engine without Python: a cached token equals an uncached one wherever the prompt is cut,
// with everything outside the valid cache poisoned. (That the numbers are right is checked against
// the golden vectors from Python.)
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "check.h"
#include "random_model.h"
#include "tlinformer/engine.h"

using namespace tlinformer;

static int64_t allocations = 0;  // through operator new, by the calling thread's code
void* operator new(size_t bytes) {
  ++allocations;
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

Tokens tokens_of(int64_t length, const Config& config) {
  Tokens tokens;
  for (int64_t i = 0; i < length; ++i)
    tokens.push_back(int32_t((i * i + 3 * i) % config.vocab_size));
  return tokens;
}

void check_same(const std::vector<float>& a, const std::vector<float>& b, double tolerance) {
  CHECK(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) CHECK_CLOSE(a[i], b[i], tolerance);
}

void test_every_cut(const Config& config, DType dtype, int threads, double tolerance) {
  const RandomModel model(config, dtype);
  const Tokens tokens = tokens_of(23, config);
  std::vector<std::vector<float>> uncached;
  for (size_t length = 1; length <= tokens.size(); ++length) {
    Owned owned(model, 23, 1, threads);
    owned.engine.prefill({Tokens(tokens.begin(), tokens.begin() + int64_t(length))});
    uncached.push_back(owned.logits());
  }
  for (size_t cut = 1; cut < tokens.size(); ++cut) {
    Owned owned(model, 23, 1, threads);
    owned.engine.prefill({Tokens(tokens.begin(), tokens.begin() + int64_t(cut))});
    for (size_t i = cut; i < tokens.size(); ++i) {
      owned.engine.step({tokens[i]});
      check_same(owned.logits(), uncached[i], tolerance);
    }
  }
}

void test_batch(const Config& config) {
  const RandomModel model(config, DType::float32);
  const std::vector<Tokens> prompts{tokens_of(3, config), tokens_of(14, config),
                                    tokens_of(8, config)};
  Owned batch(model, 40, 3, 2);
  batch.engine.prefill(prompts);
  const auto together = batch.engine.generate(20, {});
  const auto logits = batch.logits();
  for (size_t i = 0; i < prompts.size(); ++i) {
    Owned single(model, 40, 1, 1);
    single.engine.prefill({prompts[i]});
    CHECK(single.engine.generate(20, {})[0] == together[i]);
    const auto row = logits.begin() + int64_t(i) * config.vocab_size;
    check_same({row, row + config.vocab_size}, single.logits(), 1e-4);
  }
}

void test_interruption(const Config& config) {
  const RandomModel model(config, DType::float32);
  const Tokens tokens = tokens_of(16, config);  // the 17th token slides
  Owned whole(model, 40, 1, 1), cut(model, 40, 1, 1);
  whole.engine.prefill({tokens});
  whole.engine.step({5});
  const Progress never = [](double) { return false; };
  check_throws<Interrupted>("interrupted", [&] { cut.engine.prefill({tokens}, never); });
  CHECK(cut.engine.sequences() == 0);
  check_throws<InvalidArgument>("prefill first", [&] { cut.engine.step({5}); });
  double last = 0;
  cut.engine.prefill({tokens}, [&](double share) {
    CHECK(share >= last && share <= 1);
    last = share;
    return true;
  });
  CHECK(last == 1);
  int calls = 0;  // interrupted in the middle of a slide, then asked again: nothing is lost
  check_throws<Interrupted>("interrupted",
                            [&] { cut.engine.step({5}, [&](double) { return ++calls < 3; }); });
  CHECK(cut.engine.stats().history_length[0] == 12);
  cut.engine.step({5});
  check_same(cut.logits(), whole.logits(), 0);
}

void test_interrupted_batch(const Config& config) {
  const RandomModel model(config, DType::float32);
  Owned owned(model, 40, 2, 1);
  const std::vector<Tokens> prompts{tokens_of(16, config), tokens_of(8, config)};
  owned.engine.prefill(prompts);
  int64_t slides = owned.engine.stats().slides;
  check_throws<Interrupted>("interrupted", [&] {  // in the second sequence's slide
    owned.engine.step({5, 6}, [&](double) { return owned.engine.stats().slides == slides; });
  });
  owned.engine.prefill({{1, 2, 3}});  // forgets the slide that was done
  owned.engine.step({4});
  CHECK(owned.engine.stats().hits == 1);
  owned.engine.reset();
  owned.engine.prefill(prompts);
  slides = owned.engine.stats().slides;
  check_throws<Interrupted>("interrupted", [&] {
    owned.engine.step({5, 6}, [&](double) { return owned.engine.stats().slides == slides; });
  });
  owned.engine.step({5, 6});
  CHECK(owned.engine.stats().slides == slides + 2 && owned.engine.stats().hits == 0);
}

void test_hits_allocate_nothing(const Config& config) {
  const RandomModel model(config, DType::bfloat16);
  Owned owned(model, 40, 2, 2);
  owned.engine.prefill({tokens_of(16, config), tokens_of(13, config)});
  owned.engine.step({1, 2});  // a slide and a hit
  const Tokens tokens{3, 4};
  const int64_t before = allocations;
  owned.engine.step(tokens);
  CHECK(allocations == before);
  CHECK(owned.engine.stats().slides == 3 && owned.engine.stats().hits == 3);
}

void test_errors(const Config& config) {
  const RandomModel model(config, DType::float32);
  Owned owned(model, 10, 2, 1);
  Engine& engine = owned.engine;
  check_throws<InvalidArgument>("empty", [&] { engine.prefill({Tokens{}}); });
  check_throws<InvalidArgument>("max_context = 10", [&] { engine.prefill({Tokens(11, 1)}); });
  check_throws<InvalidArgument>("37", [&] { engine.prefill({Tokens{37}}); });
  check_throws<InvalidArgument>("batch_size", [&] { engine.prefill(std::vector<Tokens>(3, {1})); });
  engine.prefill({{1, 2, 3}, {4}});
  check_throws<InvalidArgument>("one each", [&] { engine.step({1}); });
  check_throws<InvalidArgument>("-1", [&] { engine.step({1, -1}); });
  check_throws<InvalidArgument>("max_context = 10", [&] { engine.generate(8, {}); });
  SamplingParams bad;
  bad.top_p = 0;
  check_throws<InvalidArgument>("top_p", [&] { engine.generate(1, bad); });
  engine.generate(7, {});  // still usable, exactly full
  check_throws<InvalidArgument>("cannot take", [&] { engine.step({1, 1}); });
  const CachePlanOptions roomy{1000, 1, DType::float32};
  const int64_t bytes = CachePlan::make(config, roomy).total_bytes();
  CachePlanOptions tight = roomy;
  tight.max_context = 2000;
  tight.memory_limit = bytes;
  check_throws<OutOfMemory>("max_context = 100", [&] { CachePlan::make(config, tight); });
  const int64_t longest = CachePlan::longest_context(config, tight);
  const auto fits = [&](int64_t context) {
    return CachePlan::make(config, {context, 1, DType::float32}).total_bytes() <= bytes;
  };
  CHECK(longest >= 1000 && fits(longest) && !fits(longest + 1));
  check_throws<InvalidArgument>(
      "arena", [&] { Engine(config, model.weights, owned.plan, {owned.memory.data(), 10}); });
  Config odd = config;
  odd.num_key_value_heads = 3;
  check_throws<InvalidArgument>("num_key_value_heads", [&] { odd.validate(); });
  engine.prefill({{1}});
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  check_throws<InvalidArgument>("cannot take", [&] { engine.generate(kMost, {}); });
  const Arena arena{Owned::aligned(owned.memory), owned.plan.total_bytes()};
  Config other = config;
  other.generation_window = 2;
  check_throws<InvalidArgument>("another config",
                                [&] { Engine(other, model.weights, owned.plan, arena); });
  check_throws<InvalidArgument>(
      "num_threads", [&] { Engine(config, model.weights, owned.plan, arena, {1 << 30}); });
  odd = config;
  odd.num_blocks = int64_t{1} << 30;
  check_throws<InvalidArgument>("65536", [&] { odd.validate(); });
  odd = config;
  odd.intermediate_size = odd.generation_window = (int64_t{1} << 31) - 1;
  check_throws<OutOfMemory>("can address",
                            [&] { CachePlan::make(odd, {int64_t{1} << 32, 1, DType::float32}); });
  odd.history_window = Config::kAuto;
  odd.history_window_coefficient = 1e300;
  CHECK(odd.compressed_rows(1000) == 1000);
}

// So many that threads share their check.
template <class Id>
void test_many_ids(Config config) {
  config.num_blocks = 1;
  config.block_depth = 2;
  const RandomModel model(config, DType::float32);
  const Tokens tokens = tokens_of((1 << 18) + 3, config);
  Owned owned(model, int64_t(tokens.size()), 1, 2);
  owned.engine.prefill({tokens});
  const auto want = owned.logits();
  std::vector<Id> ids(tokens.begin(), tokens.end());
  const TokenIds prompt{ids.data(), int64_t(ids.size()), sizeof(Id) == 8};
  owned.engine.prefill({{1}});
  owned.engine.prefill(&prompt, 1);
  CHECK(owned.logits() == want);
  for (Id wrong : {Id{-1}, Id(config.vocab_size), std::numeric_limits<Id>::max()}) {
    for (size_t at : {size_t{0}, ids.size() - 1}) {
      const Id right = std::exchange(ids[at], wrong);
      const std::string said = "prompt 0: token id " + std::to_string(wrong) + " is outside";
      check_throws<InvalidArgument>(said.c_str(), [&] { owned.engine.prefill(&prompt, 1); });
      ids[at] = right;
    }
  }
  CHECK(owned.engine.stats().prefills == 3 && owned.logits() == want);
}

void test_plan(const Config& config) {
  const CachePlan plan = CachePlan::make(config, {1001, 2, DType::bfloat16});
  int64_t end = 0;
  for (const Region& region : plan.regions()) {
    CHECK(region.offset >= end && region.offset % CachePlan::kAlignment == 0 && region.bytes > 0);
    end = region.offset + region.bytes;
  }
  CHECK(end <= plan.total_bytes());
  const int64_t rows = 3 * 1000 + 3 * 2 * 5 + 3 * 3 * 4;  // history, context, window
  CHECK(plan.cache_bytes() == 2 * 2 * 2 * config.kv_dim() * rows);
}

}  // namespace

int main() {
  Config config = small_config();
  test_every_cut(config, DType::float32, 1, 1e-4);
  test_every_cut(config, DType::float32, 2, 1e-4);
  test_every_cut(config, DType::bfloat16, 2, 0.15);  // keys cached in 8 bits of mantissa
  config.num_blocks = 1;
  config.block_depth = 2;
  config.history_window = Config::kAuto;
  config.variant = Variant::tconstformer;
  test_every_cut(config, DType::float32, 2, 1e-4);
  config = small_config();
  config.generation_window = 1;
  test_every_cut(config, DType::float32, 2, 1e-4);
  config = small_config();
  test_batch(config);
  test_interruption(config);
  test_interrupted_batch(config);
  test_hits_allocate_nothing(config);
  test_errors(config);
  test_many_ids<int32_t>(config);
  test_many_ids<int64_t>(config);
  test_plan(config);
}
