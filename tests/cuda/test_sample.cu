// The sampler on the device against the sampler on the CPU. `bench` times it instead.
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "cpu/sample.h"
#include "cuda/step/sample.h"
#include "gpu.h"

using namespace tlinformer;
using namespace tlinformer::cuda;
using gpu::Array;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr size_t kRingRows = 7;
constexpr int kPairs = 18;

cudaStream_t stream;

template <class T>
std::vector<T> one(const T& value) {
  return std::vector<T>(1, value);
}

// What a sample_step reads and writes, and what the host expects of it.
template <class T>
struct Sequences {
  size_t batch, vocab, hidden, stride, count;
  std::vector<float> logits, x;
  std::vector<SequenceState> state;
  std::vector<int32_t> tokens;
  std::vector<uint8_t> seen, stops;
  std::vector<T> embed;
  int64_t draws = 0;

  Array<float> logits_d, x_d;
  Array<Candidate> candidates_d;
  Array<SequenceState> state_d;
  Array<int32_t> tokens_d;
  Array<uint8_t> seen_d, stops_d;
  Array<T> embed_d;
  Array<DeviceSampling> sampling_d;
  Array<int64_t> draws_d;
  Array<float2> rotations_d;
  Array<char> scratch_d;
  int32_t* ring = nullptr;
  SampleStep step;

  Sequences(const std::vector<float>& of_logits, size_t rows, size_t candidates, unsigned seed,
            size_t width = 24, size_t positions = 64)
      : batch(rows),
        vocab(of_logits.size() / rows),
        hidden(width),
        stride(positions),
        count(candidates),
        logits(of_logits),
        state(rows),
        stops(vocab, 0),
        embed(gpu::normal<T>(vocab * width, seed)),
        logits_d(logits.size()),
        x_d(rows * width),
        candidates_d(rows * candidates),
        state_d(rows),
        tokens_d(rows * positions),
        seen_d(logits.size()),
        stops_d(vocab),
        embed_d(embed),
        sampling_d(1),
        draws_d(one(draws)),
        rotations_d(rows * kPairs),
        scratch_d(std::vector<char>(
            static_cast<size_t>(sample_scratch(static_cast<int>(rows), static_cast<int>(vocab))))) {
    check(cudaHostAlloc(&ring, kRingRows * rows * sizeof(int32_t), cudaHostAllocMapped), "ring");
    std::fill(ring, ring + kRingRows * rows, kPending);
    std::mt19937 random(seed);
    for (SequenceState& s : state) {
      s.last = static_cast<int64_t>(random() % 5) - 1;
      s.history = 3;
      s.compressed = 2;
      s.live = 1;
    }
    tokens = tokens_d.get();
    x = x_d.get();
    seen = seen_d.get();
    step.dtype = std::is_same_v<T, bf16> ? DType::bfloat16 : DType::float16;
    step.batch = static_cast<int>(rows);
    step.vocab_size = static_cast<int>(vocab);
    step.hidden_size = static_cast<int>(width);
    step.sampling = sampling_d.data();
    step.logits = logits_d.data();
    step.candidates = candidates_d.data();
    step.candidate_count = static_cast<int>(candidates);
    step.state = state_d.data();
    step.seen = seen_d.data();
    step.stops = stops_d.data();
    step.tokens = tokens_d.data();
    step.token_stride = static_cast<int64_t>(positions);
    step.embed = embed_d.data();
    step.x = x_d.data();
    step.ring = ring;
    step.ring_rows = kRingRows;
    step.draws = draws_d.data();
    for (int i = 0; i < kPairs; ++i) step.rope.turns[i] = 0.1234 / (i + 1);
    step.pairs = kPairs;
    step.rotations = rotations_d.data();
    step.scratch = scratch_d.data();
    upload();
  }
  ~Sequences() { cudaFreeHost(ring); }
  Sequences(const Sequences&) = delete;
  Sequences& operator=(const Sequences&) = delete;

  // With the candidates as head_step makes them, of tiles of 8 tokens dealt out in turn.
  void upload() {
    std::vector<Candidate> candidates(batch * count, {-kInfinity, 0x7fffffff});
    for (size_t i = 0; i < logits.size(); ++i) {
      const size_t token = i % vocab;
      Candidate& best = candidates[i / vocab * count + token / 8 % count];
      if (std::isnan(best.logit)) continue;
      if (!(logits[i] <= best.logit) || best.token == 0x7fffffff) {
        best = {logits[i], static_cast<int32_t>(token)};
      }
    }
    candidates_d.set(candidates);
    logits_d.set(logits);
    stops_d.set(stops);
    state_d.set(state);
    seen_d.set(seen);
    tokens_d.set(tokens);
  }

  void use(const SamplingParams& p) {
    sampling_d.set(one(
        DeviceSampling{p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.top_k, p.seed}));
  }

  void check_rotations(size_t b, int64_t position) const {
    const auto got = rotations_d.get();
    for (int i = 0; i < kPairs; ++i) {
      const double angle = 2 * M_PI * step.rope.turns[i] * static_cast<double>(position);
      CHECK_CLOSE(got[b * kPairs + i].x, std::cos(angle), 2e-6);
      CHECK_CLOSE(got[b * kPairs + i].y, std::sin(angle), 2e-6);
    }
  }

  void started(size_t b, int32_t token) {
    const T* const row = embed.data() + static_cast<size_t>(token) * hidden;
    std::copy(row, row + hidden, x.begin() + static_cast<std::ptrdiff_t>(b * hidden));
  }

  // One launch. Returns how many tokens differ from the CPU's.
  int64_t draw(const SamplingParams& p, bool early) {
    sample_step(step, {stream, early});
    check(cudaStreamSynchronize(stream), "sample_step");
    cpu::Sampler sampler;
    int64_t different = 0;
    int32_t* const places = ring + static_cast<size_t>(draws++) % kRingRows * batch;
    for (size_t b = 0; b < batch; ++b) {
      SequenceState& s = state[b];
      const int32_t got = places[b];
      places[b] = kPending;
      if (s.live != 1) {
        CHECK(got == kPending);
        s.live = 0;
        continue;
      }
      const float* const row = logits.data() + b * vocab;
      uint8_t* const flags = p.repetition_penalty != 1 ? seen.data() + b * vocab : nullptr;
      const float* const nan =
          std::find_if(row, row + vocab, [](float l) { return std::isnan(l); });
      if (nan != row + vocab) {
        CHECK(got == -2 - static_cast<int32_t>(nan - row));
        s.live = 0;
        continue;
      }
      CHECK(got >= 0 && got < static_cast<int32_t>(vocab));
      different += got != sampler.draw(row, static_cast<int64_t>(vocab), p, flags,
                                       static_cast<int64_t>(b), s.last + 1);
      s.last += 1;
      check_rotations(b, s.last);
      tokens[b * stride + static_cast<size_t>(s.last)] = got;
      if (flags) flags[got] = kSeen;
      if (stops[static_cast<size_t>(got)]) s.live = 2;
      started(b, got);
    }
    CHECK(std::all_of(ring, ring + kRingRows * batch, [](int32_t t) { return t == kPending; }));
    return different;
  }

  void feed(bool early) {
    feed_step(step, {stream, early});
    check(cudaStreamSynchronize(stream), "feed_step");
    for (size_t b = 0; b < batch; ++b) {
      if (state[b].live == 0) continue;
      state[b].last += 1;
      check_rotations(b, state[b].last);
      started(b, tokens[b * stride + static_cast<size_t>(state[b].last)]);
    }
    CHECK(std::all_of(ring, ring + kRingRows * batch, [](int32_t t) { return t == kPending; }));
  }

  void check_all() const {
    CHECK(draws_d.get()[0] == draws);
    CHECK(tokens_d.get() == tokens);
    CHECK(seen_d.get() == seen);
    const std::vector<float> of_x = x_d.get();
    CHECK(std::memcmp(of_x.data(), x.data(), x.size() * sizeof(float)) == 0);
    const std::vector<SequenceState> now = state_d.get();
    for (size_t b = 0; b < batch; ++b) {
      CHECK(now[b].last == state[b].last && now[b].live == state[b].live);
      CHECK(now[b].history == 3 && now[b].compressed == 2);
    }
  }
};

enum class Kind { normal, flat, wide, ties, equal, masked, outlier, count };

std::vector<float> some_logits(Kind kind, size_t count, unsigned seed) {
  std::vector<float> logits = gpu::normal<float>(count, seed, 3.0f);
  std::mt19937 random(seed + 1);
  for (float& l : logits) {
    if (kind == Kind::flat) l = -90 + l / 100;
    if (kind == Kind::wide) l = l * 20 + 7;
    if (kind == Kind::ties) l = std::round(l * 2) / 2;
    if (kind == Kind::equal) l = -1.25f;
    if (kind == Kind::masked && random() % 4 != 0) l = random() % 2 ? -kInfinity : -1e9f;
    if (kind == Kind::outlier) l = random() % 2 ? l * 1e-20f : l * 1e-3f;
  }
  if (kind == Kind::outlier) logits[count / 2] = 2;
  return logits;
}

std::vector<SamplingParams> some_params(size_t vocab) {
  std::vector<SamplingParams> all;
  const auto add = [&](double temperature, int64_t top_k, double top_p, double min_p,
                       double penalty) {
    SamplingParams p;
    p.temperature = temperature;
    p.top_k = top_k;
    p.top_p = top_p;
    p.min_p = min_p;
    p.repetition_penalty = penalty;
    p.seed = 0x123456789abcdef * (all.size() + 1);
    p.validate(static_cast<int64_t>(vocab));
    all.push_back(p);
  };
  const int64_t v = static_cast<int64_t>(vocab);
  add(0, 0, 1, 0, 1);
  add(0, 5, 0.5, 0.1, 1.3);
  add(0, 0, 1, 0, 0.7);
  add(1, 0, 1, 0, 1);
  add(0.7, 0, 1, 0.02, 1);
  add(1.3, 0, 1, 0, 1.2);
  add(0.8, 50, 0.95, 0, 1);
  add(0.8, 50, 0.95, 0.05, 1.1);
  add(1, 0, 0.9, 0, 1);
  add(2, 0, 0.99, 0.001, 0.8);
  add(1, 7, 1, 0, 1);
  add(1, 1, 1, 0, 1);
  add(5, v - 1, 1, 0, 1);
  add(5, v, 0.999, 0, 1);
  add(100, v / 3, 0.7, 0, 1.5);
  add(1e-3, 0, 1, 0, 1);
  add(1e-3, 40, 0.9, 0, 1);
  add(1e-300, 40, 0.9, 0.5, 1);
  add(1e6, 0, 0.5, 0, 1);
  add(1, 0, 1e-9, 1, 1);
  add(1, 0, 1, 1, 1);
  return all;
}

struct Tally {
  int64_t draws = 0, different = 0;
};

template <class T>
void test_draws(Kind kind, size_t vocab, size_t batch, size_t candidates, const SamplingParams& p,
                int steps, unsigned seed, Tally& tally) {
  Sequences<T> all(some_logits(kind, vocab * batch, seed), batch, candidates, seed,
                   vocab > 10000 ? 8 : 24);
  if (p.repetition_penalty != 1) {
    std::mt19937 random(seed);
    for (uint8_t& flag : all.seen) flag = random() % 3 == 0 ? kSeen : 0;
  }
  if (batch > 2) {
    all.state[1].live = 0;
    all.state[2].live = 2;
  }
  all.upload();
  all.use(p);
  for (int i = 0; i < steps; ++i) {
    for (const SequenceState& s : all.state) tally.draws += s.live == 1;
    tally.different += all.draw(p, (seed + static_cast<unsigned>(i)) % 2 == 0);
  }
  all.check_all();
}

void test_vocab(size_t vocab, int steps, unsigned seeds) {
  Tally tally;
  for (unsigned seed = 1; seed <= seeds; ++seed) {
    for (int kind = 0; kind < static_cast<int>(Kind::count); ++kind) {
      unsigned i = 0;
      for (SamplingParams p : some_params(vocab)) {
        p.seed += seed;
        const unsigned s = seed * 1000 + static_cast<unsigned>(kind) * 100 + i++;
        const size_t batch = s % 2 ? 1 : 5, candidates = s % 3 == 0 ? 1 : s % 3 == 1 ? 264 : 700;
        // At large sizes the host is what takes long.
        if (vocab > 10000 && (i + static_cast<unsigned>(kind) + seed) % 3 != 0) continue;
        if (s % 4 < 2) {
          test_draws<bf16>(static_cast<Kind>(kind), vocab, batch, candidates, p, steps, s, tally);
        } else {
          test_draws<f16>(static_cast<Kind>(kind), vocab, batch, candidates, p, steps, s, tally);
        }
      }
    }
  }
  // Only the rounding of weights may decide otherwise.
  if (tally.different * 1000 > tally.draws) {
    std::fprintf(stderr, "V = %zu: %lld of %lld tokens differ\n", vocab,
                 static_cast<long long>(tally.different), static_cast<long long>(tally.draws));
  }
  CHECK(tally.different * 1000 <= tally.draws);
}

// NaN anywhere, for the greedy draw and the others; a stop token; nobody live.
void test_ends() {
  for (const SamplingParams& p : some_params(1000)) {
    Sequences<bf16> all(gpu::normal<float>(4 * 1000, 5), 4, 40, 6);
    for (uint8_t& flag : all.seen) flag = 0;
    all.logits[0 * 1000 + 999] = kNaN;
    all.logits[1 * 1000 + 0] = -kNaN;
    for (size_t i : {300, 400, 900}) all.logits[2 * 1000 + i] = kNaN;
    all.stops.assign(1000, 1);
    all.upload();
    all.use(p);
    CHECK(all.draw(p, false) == 0);
    CHECK(all.state[0].live == 0 && all.state[1].live == 0 && all.state[2].live == 0);
    CHECK(all.state[3].live == 2);
    all.check_all();
    for (int i = 0; i < 2; ++i) CHECK(all.draw(p, true) == 0);
    CHECK(all.state[3].live == 0 && all.draws == 3);
    all.check_all();
  }
}

// Nothing to choose from: infinite logits, and zeros of both signs.
void test_special_values() {
  for (const SamplingParams& p : some_params(53)) {
    Sequences<bf16> all(gpu::normal<float>(4 * 53, 7), 4, 6, 8);
    for (uint8_t& flag : all.seen) flag = 0;
    for (size_t i = 0; i < 53; ++i) {
      all.logits[i] = -kInfinity;
      all.logits[53 + i] = i % 7 == 5 ? kInfinity : all.logits[53 + i];
      all.logits[2 * 53 + i] = i % 3 == 0 ? -kInfinity : i % 2 ? -0.0f : 0.0f;
      all.logits[3 * 53 + i] = i == 17 ? -3.0f : -kInfinity;
    }
    all.upload();
    all.use(p);
    for (int i = 0; i < 4; ++i) CHECK(all.draw(p, false) == 0);
    all.check_all();
  }
}

// Parameters change between the launches of one captured step; feeds come in between.
void test_feed_and_change() {
  Sequences<f16> all(gpu::normal<float>(3 * 100, 9, 2.0f), 3, 5, 10, 432);
  all.state[1].live = 0;
  for (size_t b = 0; b < 3; ++b) {
    for (size_t i = 0; i < all.stride; ++i) all.tokens[b * all.stride + i] = int32_t(i * 7 % 100);
  }
  for (uint8_t& flag : all.seen) flag = 0;
  all.upload();
  for (const SamplingParams& p : some_params(100)) {
    all.use(p);
    CHECK(all.draw(p, false) == 0);
    all.feed(false);
    all.feed(true);
    all.check_all();
    if (all.state[0].last > 55) break;
  }
}

void bench() {
  constexpr size_t kVocab = 50257;
  struct Case {
    const char* name;
    double temperature;
    int64_t top_k;
    double top_p, min_p, penalty;
  };
  const Case cases[] = {{"greedy", 0, 0, 1, 0, 1},
                        {"greedy, penalty 1.2", 0, 0, 1, 0, 1.2},
                        {"temperature 1", 1, 0, 1, 0, 1},
                        {"temperature 1, min_p 0.05", 1, 0, 1, 0.05, 1},
                        {"temperature 0.8, top_k 50", 0.8, 50, 1, 0, 1},
                        {"temperature 1, top_p 0.9", 1, 0, 0.9, 0, 1},
                        {"temperature 0.8, top_k 50, top_p 0.95", 0.8, 50, 0.95, 0, 1},
                        {"all filters, penalty 1.2", 0.8, 50, 0.95, 0.01, 1.2},
                        {"temperature 10, top_p 0.9", 10, 0, 0.9, 0, 1}};
  for (size_t batch : {1, 8, 32}) {
    Sequences<bf16> all(some_logits(Kind::normal, kVocab * batch, 1), batch, 264, 2, 432, 1 << 14);
    for (uint8_t& flag : all.seen) flag = 0;
    all.upload();
    const double bytes = double(kVocab * batch * 4);
    for (const Case& c : cases) {
      SamplingParams p;
      p.temperature = c.temperature;
      p.top_k = c.top_k;
      p.top_p = c.top_p;
      p.min_p = c.min_p;
      p.repetition_penalty = c.penalty;
      all.use(p);
      const bool reads = c.temperature != 0 || c.penalty != 1;
      const double us =
          gpu::microseconds([&](cudaStream_t s) { sample_step(all.step, {s, true}); });
      gpu::report("sample, " + std::string(c.name) + ", B " + std::to_string(batch), us,
                  reads ? bytes : double(batch * 264 * sizeof(Candidate)), 0);
    }
    for (SequenceState& s : all.state) s.last = 0;
    std::fill(all.tokens.begin(), all.tokens.end(), 1);
    all.upload();
    const double us = gpu::microseconds([&](cudaStream_t s) { feed_step(all.step, {s, true}); });
    gpu::report("feed, B " + std::to_string(batch), us, double(batch * 432 * 6), 0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  if (argc > 1 && std::string(argv[1]) == "bench") {
    bench();
    return 0;
  }
  test_ends();
  test_special_values();
  test_feed_and_change();
  test_vocab(11, 12, 3);
  test_vocab(53, 12, 3);
  test_vocab(1000, 6, 2);
  test_vocab(50257, 3, 1);
  std::puts("ok");
  return 0;
}
