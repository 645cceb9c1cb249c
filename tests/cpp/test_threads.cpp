// Engines are independent: two of them, of one model, work on two threads at once and compute what
// one alone does. Built with ThreadSanitizer by `make tsan`.
#include <thread>

#include "check.h"
#include "random_model.h"
#include "tlinformer/engine.h"

using namespace tlinformer;

namespace {

struct Result {
  std::vector<Tokens> tokens;
  std::vector<float> logits;
};

// What an engine does from its creation to its end.
Result work(const RandomModel& model, int64_t length, const std::string& path) {
  Owned owned(model, 120, 2, 1);
  Tokens prompt(static_cast<size_t>(length), 3);
  for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<int32_t>(i * i % 37);
  owned.engine.prefill({prompt, {1, 2}});
  SamplingParams sampled;
  sampled.temperature = 0.8;
  sampled.top_p = 0.9;
  owned.engine.generate(9, sampled);
  owned.engine.save_state(path);
  owned.engine.step({4, 5});
  owned.engine.load_state(path);
  std::remove(path.c_str());
  const std::vector<Tokens> tokens = owned.engine.generate(30, {});
  return {tokens, owned.logits()};
}

}  // namespace

int main() {
  for (DType dtype : {DType::float32, DType::bfloat16}) {
    const RandomModel model(small_config(), dtype);
    Result results[2];
    std::vector<std::thread> threads;
    for (int i = 0; i < 2; ++i) {
      threads.emplace_back([&, i] {
        for (int repeat = 0; repeat < 3; ++repeat) {
          results[i] = work(model, 40 + 20 * i, "threads-" + std::to_string(i) + ".state");
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (int i = 0; i < 2; ++i) {
      const Result alone = work(model, 40 + 20 * i, "alone.state");
      CHECK(results[i].tokens == alone.tokens && results[i].logits == alone.logits);
    }
  }
}
