// The engine on a GPU against the engine on the CPU, and against itself. With the argument `bench`
// it prints what a token, a prefill and a slide cost instead; with `bench <history> <batch>` what a
// token of a batch costs, and each kind of its kernels. `small` and `large` are two parts of the
// test; sanitizers have time for the first.
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>

#include "../cpp/random_model.h"
#include "cuda/step/step.h"
#include "gpu.h"
#include "step_profile.h"
#include "tlinformer/engine.h"

using namespace tlinformer;

namespace {

// Weights copied to the device, and an engine whose keys and values are NaN until written.
struct OnDevice {
  std::vector<std::unique_ptr<gpu::Array<char>>> arrays;
  Weights weights;
  CachePlan plan;
  std::unique_ptr<gpu::Array<char>> arena;
  std::unique_ptr<Engine> engine;

  const void* copy(const void* from, int64_t elements) {
    const char* bytes = static_cast<const char*>(from);
    arrays.push_back(std::make_unique<gpu::Array<char>>(
        std::vector<char>(bytes, bytes + elements * size_of(weights.dtype))));
    return arrays.back()->data();
  }

  OnDevice(const RandomModel& model, int64_t max_context, int64_t batch = 1) {
    const Config& c = model.config;
    const int64_t d = c.hidden_size, f = c.intermediate_size, qkv = c.query_dim() + 2 * c.kv_dim();
    weights.dtype = model.weights.dtype;
    weights.embed_tokens = copy(model.weights.embed_tokens, c.vocab_size * d);
    weights.norm_weight = copy(model.weights.norm_weight, d);
    weights.norm_bias = copy(model.weights.norm_bias, d);
    for (const LayerWeights& from : model.weights.layers) {
      weights.layers.push_back({copy(from.attn_norm_weight, d), copy(from.attn_norm_bias, d),
                                copy(from.qkv_proj_weight, qkv * d), copy(from.qkv_proj_bias, qkv),
                                copy(from.out_proj_weight, d * d), copy(from.out_proj_bias, d),
                                copy(from.mlp_norm_weight, d), copy(from.mlp_norm_bias, d),
                                copy(from.gate_proj_weight, f * d),
                                copy(from.up_proj_weight, f * d),
                                copy(from.down_proj_weight, d * f)});
    }
    plan = CachePlan::make(c, {max_context, batch, weights.dtype, 0, Device::cuda});
    arena = std::make_unique<gpu::Array<char>>(static_cast<size_t>(plan.total_bytes()));
    engine = std::make_unique<Engine>(c, weights, plan, Arena{arena->data(), plan.total_bytes()});
  }

  std::vector<float> logits() const {
    std::vector<float> to(static_cast<size_t>(engine->sequences() * engine->config().vocab_size));
    cuda::check(
        cudaMemcpy(to.data(), engine->logits(), to.size() * sizeof(float), cudaMemcpyDeviceToHost),
        "cudaMemcpy");
    return to;
  }
};

Config two_heads() {  // of 36
  Config c = small_config();
  c.hidden_size = 72;
  c.num_attention_heads = 2;
  c.num_blocks = 2;
  return c;
}

Tokens tokens_of(int64_t length, const Config& config, unsigned seed = 1) {
  std::mt19937 generator(seed);
  Tokens tokens;
  for (int64_t i = 0; i < length; ++i) {
    tokens.push_back(static_cast<int32_t>(generator() % static_cast<uint32_t>(config.vocab_size)));
  }
  return tokens;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  CHECK(a.size() == b.size());
  double difference = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    CHECK(std::isfinite(a[i]));
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  return std::sqrt(difference / size);
}

constexpr double kRounding = 0.03;  // of bfloat16 through a few layers, relative to all logits

void test_prefill_and_steps(const char* name, const Config& config, int64_t length) {
  const RandomModel model(config, DType::bfloat16);
  const Tokens tokens = tokens_of(length, config);
  double worst = 0;
  OnDevice device(model, length);
  Owned cpu(model, length, 1, 0);
  for (int64_t cut : {int64_t{1}, int64_t{3}, config.generation_window,
                      config.generation_window + 1, length / 2, length - 1, length}) {
    if (cut < 1 || cut > length) continue;
    const Tokens prompt(tokens.begin(), tokens.begin() + cut);
    device.engine->prefill({prompt});
    cpu.engine.prefill({prompt});
    worst = std::max(worst, distance(device.logits(), cpu.logits()));
    for (int64_t i = cut; i < std::min(length, cut + 3 * config.generation_window); ++i) {
      device.engine->step({tokens[static_cast<size_t>(i)]});
      cpu.engine.step({tokens[static_cast<size_t>(i)]});
      worst = std::max(worst, distance(device.logits(), cpu.logits()));
    }
  }
  std::printf("%-40s %.4f\n", name, worst);
  CHECK(worst < kRounding);
}

// Histories of several pieces, one sequence after the other, while an earlier prompt is under way.
void test_pieces(const Config& config) {
  constexpr int64_t kLength = 18000;
  const RandomModel model(config, DType::bfloat16);
  OnDevice device(model, kLength, 2);
  CHECK(4 * device.plan.piece_rows() < kLength);
  Owned cpu(model, kLength, 2, 0);
  const std::vector<Tokens> prompts{tokens_of(kLength, config, 1), tokens_of(9001, config, 2)};
  device.engine->prefill({tokens_of(kLength, config, 3)});
  device.engine->prefill(prompts);
  cpu.engine.prefill(prompts);
  const double difference = distance(device.logits(), cpu.logits());
  std::printf("%-40s %.4f\n", "several pieces", difference);
  CHECK(difference < kRounding);
}

// A single sequence's history in the kernel that cuts it into parts, and steps after it.
void test_long(const char* name, const Config& config, int64_t length) {
  const RandomModel model(config, DType::bfloat16);
  const Tokens prompt = tokens_of(length, config);
  OnDevice device(model, length + 10);
  Owned cpu(model, length + 10, 1, 0);
  device.engine->prefill({prompt});
  cpu.engine.prefill({prompt});
  double worst = distance(device.logits(), cpu.logits());
  for (const int32_t token : tokens_of(10, config, 2)) {
    device.engine->step({token});
    cpu.engine.step({token});
    worst = std::max(worst, distance(device.logits(), cpu.logits()));
  }
  std::printf("%-40s %.4f\n", name, worst);
  CHECK(worst < kRounding);
}

// generate equals its tokens pushed one by one, however it was cut, to the last bit.
void test_generate(const Config& config, int64_t batch) {
  const RandomModel model(config, DType::bfloat16);
  std::vector<Tokens> prompts;
  for (int64_t i = 0; i < batch; ++i) prompts.push_back(tokens_of(3 + 7 * i, config, unsigned(i)));
  const int64_t room = 3 + 7 * batch + 60;
  OnDevice whole(model, room, batch), parts(model, room, batch), steps(model, room, batch);
  SamplingParams sampling;
  sampling.temperature = 1;
  sampling.seed = 11;
  for (OnDevice* each : {&whole, &parts, &steps}) each->engine->prefill(prompts);
  const auto tokens = whole.engine->generate(50, sampling);
  std::vector<Tokens> got(static_cast<size_t>(batch));
  const auto take = [&](const std::vector<Tokens>& more) {
    for (size_t i = 0; i < got.size(); ++i)
      got[i].insert(got[i].end(), more[i].begin(), more[i].end());
  };
  take(parts.engine->generate(1, sampling));
  int64_t left = 7 * batch;  // stops after the seventh
  take(parts.engine->generate(40, sampling, [&](int64_t, int32_t) { return --left > 0; }));
  check_throws<std::runtime_error>("enough", [&] {
    int64_t calls = 0;
    parts.engine->generate(40, sampling, [&](int64_t, int32_t) -> bool {
      if (++calls > 5 * batch) throw std::runtime_error("enough");
      return true;
    });
  });
  for (size_t i = 0; i < got.size(); ++i) {  // the five that were cached before the exception
    got[i].insert(got[i].end(), tokens[i].begin() + 8, tokens[i].begin() + 13);
  }
  take(parts.engine->generate(37, sampling));
  CHECK(got == tokens);
  for (size_t n = 0; n < 50; ++n) {
    Tokens next;
    for (const Tokens& row : tokens) next.push_back(row[n]);
    steps.engine->step(next);
  }
  CHECK(whole.logits() == steps.logits());
  CHECK(parts.logits() == steps.logits());

  sampling.stop_token_ids = {tokens[0][20]};
  whole.engine->prefill(prompts);
  const auto stopped = whole.engine->generate(50, sampling);
  for (size_t i = 0; i < stopped.size(); ++i) {
    const auto end = std::find(tokens[i].begin(), tokens[i].end(), tokens[0][20]);
    CHECK(stopped[i] == Tokens(tokens[i].begin(), end == tokens[i].end() ? end : end + 1));
  }
}

// A restored or forked state goes on to the last bit, wherever in its window it was saved.
void test_state(const Config& config) {
  const RandomModel model(config, DType::bfloat16);
  const std::string path = "tlinformer-test-engine.state";
  OnDevice original(model, 60, 3), restored(model, 90, 3);
  SamplingParams sampled;
  sampled.temperature = 1;
  sampled.repetition_penalty = 1.2;
  for (int64_t length = 1; length < 10; ++length) {
    original.engine->prefill({tokens_of(length, config), tokens_of(17, config)});
    original.engine->generate(length % 3, sampled);
    original.engine->save_state(path);
    restored.engine->prefill({tokens_of(40, config), {1}, {2}});
    restored.engine->load_state(path);
    CHECK(restored.logits() == original.logits());
    for (const SamplingParams& how : {SamplingParams{}, sampled}) {
      CHECK(restored.engine->generate(9, how) == original.engine->generate(9, how));
    }
    CHECK(restored.logits() == original.logits());
    restored.engine->load_state(path, {1, 1, 1});
    const auto forked = restored.engine->generate(9, {});
    CHECK(forked[0] == forked[1] && forked[0] == forked[2]);
  }
  std::remove(path.c_str());
}

// Ids on the device give what those on the host give; wrong ones leave everything as it was.
template <class Id>
void test_ids(const Config& config) {
  const RandomModel model(config, DType::bfloat16);
  OnDevice device(model, 40);
  const Tokens prompt = tokens_of(37, config);
  device.engine->prefill({prompt});
  const auto want = device.logits();
  std::vector<Id> ids(prompt.begin(), prompt.end());
  const auto prefill = [&] {
    const gpu::Array<Id> there(ids);
    const TokenIds at{there.data(), static_cast<int64_t>(ids.size()), sizeof(Id) == 8, true};
    device.engine->prefill(&at, 1);
    cuda::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  };
  device.engine->prefill({tokens_of(9, config, 2)});
  prefill();
  CHECK(device.logits() == want);
  for (Id wrong : {Id{-1}, static_cast<Id>(config.vocab_size), std::numeric_limits<Id>::max()}) {
    ids.back() = wrong;
    std::string said;
    try {
      prefill();
    } catch (const InvalidArgument& error) {
      said = error.what();
    }
    CHECK(said.find("token id " + std::to_string(wrong) + " is outside") != std::string::npos);
  }
  CHECK(device.logits() == want);
  device.engine->step({1});
  const auto next = device.logits();
  device.engine->prefill({prompt});
  device.engine->step({1});
  CHECK(device.logits() == next);
}

double milliseconds_since(std::chrono::steady_clock::time_point begin) {
  const auto now = std::chrono::steady_clock::now();
  return std::chrono::duration<double, std::milli>(now - begin).count();
}

double milliseconds(const std::function<void()>& work) {
  cuda::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  const auto begin = std::chrono::steady_clock::now();
  work();
  cuda::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return milliseconds_since(begin);
}

void bench(const char* name, const Config& config, const std::vector<int64_t>& lengths) {
  const RandomModel model(config, DType::bfloat16);
  for (int64_t length : lengths) {
    const int64_t room = length + 1024;
    OnDevice device(model, room);
    const Tokens prompt = tokens_of(length + 5, config);
    device.engine->prefill({prompt});
    double host = 0;  // until the call returns
    const double prefill = milliseconds([&] {
      const auto begin = std::chrono::steady_clock::now();
      device.engine->prefill({prompt});
      host = milliseconds_since(begin);
    });
    const Tokens whole(prompt.begin(), prompt.end() - 5);  // its window is full
    device.engine->prefill({whole});
    const double full = milliseconds([&] { device.engine->prefill({whole}); });
    device.engine->prefill({prompt});
    device.engine->generate(20, {});
    std::vector<double> times;
    for (int i = 0; i < 3; ++i) {
      times.push_back(milliseconds([&] { device.engine->generate(70, {}); }) / 70);
    }
    std::sort(times.begin(), times.end());
    device.engine->prefill({prompt});
    device.engine->generate(250, {});
    const double slide = milliseconds([&] { device.engine->generate(2, {}); });
    std::printf(
        "%s history %8ld: hit %.4f ms, prefill %.3f ms (host %.3f), with a full window "
        "%.3f ms, token with slide %.3f ms, "
        "plan %.1f MiB\n",
        name, static_cast<long>(length), times[1], prefill, host, full, slide,
        static_cast<double>(device.plan.total_bytes()) / (1 << 20));
  }
}

void bench_batch(const char* name, const Config& config, int64_t length, int64_t batch) {
  const RandomModel model(config, DType::bfloat16);
  OnDevice device(model, length + 1024, batch);
  std::vector<Tokens> prompts;
  for (int64_t i = 0; i < batch; ++i) prompts.push_back(tokens_of(length + 5, config, unsigned(i)));
  device.engine->prefill(prompts);
  device.engine->generate(20, {});
  std::vector<double> times;
  for (int i = 0; i < 3; ++i) {
    times.push_back(milliseconds([&] { device.engine->generate(70, {}); }) / 70);
  }
  std::sort(times.begin(), times.end());
  std::printf("%s batch %ld, history %ld: token %.4f ms\n", name, static_cast<long>(batch),
              static_cast<long>(length), times[1]);
  // The same step once more, on the engine's arena: it writes the same row again and again.
  const cuda::Model same(config, device.weights, device.plan,
                         {device.arena->data(), device.plan.total_bytes()});
  const auto workspace = cuda::Workspace::layout(config, device.plan);
  const cuda::Step step(same, workspace, same.arena + device.plan.find("workspace")->offset);
  const gpu::StepProfile profile(8, [&](const cuda::Launch& how) { step.push(how); });
  std::printf("  all but the draw and the launch of a graph: %.2f us\n", profile.report());
}

Config product_config(int64_t hidden, int64_t heads, int64_t inner) {
  Config c;
  c.vocab_size = 50257;
  c.hidden_size = hidden;
  c.num_attention_heads = c.num_key_value_heads = heads;
  c.num_blocks = 2;
  c.block_depth = 4;
  c.intermediate_size = inner;
  return c;
}

void test_small() {
  Config c = two_heads();
  test_prefill_and_steps("small", c, 31);
  CHECK(cuda::keeps_table(c, {31, 1}));
  c.vocab_size = 1000;
  test_prefill_and_steps("vocabulary too large for a table", c, 31);
  CHECK(!cuda::keeps_table(c, {31, 1}));
  c = two_heads();
  c.variant = Variant::tconstformer;
  test_prefill_and_steps("tconstformer", c, 31);
  c = two_heads();
  c.num_blocks = 4;
  c.block_depth = 2;
  test_prefill_and_steps("no hidden layer, 4 blocks", c, 31);
  c = two_heads();
  c.hidden_size = 256;
  c.num_attention_heads = 8;
  c.num_key_value_heads = 2;
  c.generation_window = 7;
  test_prefill_and_steps("grouped queries, odd windows", c, 60);
  c.num_blocks = 2;
  test_long("grouped queries, long history", c, 17000);
  c.hidden_size = 1152;  // wide
  c.num_attention_heads = 9;
  c.num_key_value_heads = 3;
  test_prefill_and_steps("wide, grouped queries", c, 40);
  test_generate(c, 1);
  c = two_heads();
  c.generation_window = 1;
  test_prefill_and_steps("a slide every token", c, 12);
  test_generate(two_heads(), 1);
  test_generate(two_heads(), 3);
  test_state(two_heads());
  test_ids<int32_t>(two_heads());
  test_ids<int64_t>(two_heads());
}

void test_large() {
  Config c = product_config(432, 12, 1280);
  c.vocab_size = 1000;
  test_prefill_and_steps("41M, small vocabulary", c, 700);
  c.vocab_size = 5000;  // no table
  test_prefill_and_steps("41M, larger vocabulary", c, 300);
  c = product_config(576, 16, 1288);  // wider than products with epilogues of our own
  c.vocab_size = 300;
  c.generation_window = c.history_window = 64;
  test_prefill_and_steps("D 576", c, 1300);
  c = product_config(432, 12, 1280);
  c.vocab_size = 300;
  c.generation_window = c.history_window = 64;
  test_pieces(c);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "bench") {
    std::vector<int64_t> lengths{1 << 10, 1 << 14, 1 << 17, 1 << 20};
    if (argc > 2) lengths = {std::atoll(argv[2])};
    if (argc > 3) {
      const int64_t batch = std::atoll(argv[3]);
      bench_batch("41M", product_config(432, 12, 1280), lengths[0], batch);
      bench_batch("D512", product_config(512, 8, 1536), lengths[0], batch);
      return 0;
    }
    bench("41M", product_config(432, 12, 1280), lengths);
    bench("D512", product_config(512, 8, 1536), lengths);
    return 0;
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string part = argc > 1 ? argv[1] : "";
  CHECK(part.empty() || part == "small" || part == "large");
  if (part != "large") test_small();
  if (part != "small") test_large();
  std::puts("ok");
}
