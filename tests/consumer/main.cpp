// Continues a prompt of token ids: consumer <model directory>.
#include <tlinformer/checkpoint.h>
#include <tlinformer/engine.h>

#include <cstdio>
#include <memory>

int main(int argc, char** argv) {
  using namespace tlinformer;
  if (argc != 2) return 2;
  try {
    Checkpoint checkpoint(argv[1]);
    const CachePlan plan = CachePlan::make(checkpoint.config(), {512, 1, checkpoint.dtype()});
    std::vector<char> memory(static_cast<size_t>(plan.total_bytes()) + 64);
    void* arena = memory.data();
    size_t space = memory.size();
    std::align(64, static_cast<size_t>(plan.total_bytes()), arena, space);
    Engine engine(checkpoint.config(), checkpoint.weights(checkpoint.dtype()), plan,
                  {arena, plan.total_bytes()}, {1});
    engine.prefill({Tokens(300, 5)});
    const Tokens tokens = engine.generate(8, {})[0];
    for (int32_t token : tokens) std::printf("%d ", token);
    return tokens.size() == 8 && engine.stats().hits == 8 ? 0 : 1;
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
