// The products of a token against float64, and (with "bench") their time at the models' sizes.
#include <cstdint>
#include <limits>
#include <memory>

#include "cuda/step/product.h"
#include "gpu.h"

using namespace tlinformer;
using namespace tlinformer::cuda;

namespace {

struct Sizes {
  int width, query_heads, kv_heads, head_dim, intermediate, vocab;
};

template <class T>
constexpr DType kType = std::is_same_v<T, bf16> ? DType::bfloat16 : DType::float16;
// Largest distance of neighbouring values of T, relative to them.
template <class T>
constexpr double kStep = std::is_same_v<T, bf16> ? 1.0 / 128 : 1.0 / 1024;

// A device array with NaN on both sides, which must stay.
template <class T>
class Fenced {
 public:
  explicit Fenced(size_t count) : count_(count), all_(count + 2 * kFence) {}
  explicit Fenced(const std::vector<T>& from) : Fenced(from.size()) { set(from); }

  void set(const std::vector<T>& from) {
    check(cudaMemcpy(data(), from.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  std::vector<T> get() const {
    const std::vector<T> all = all_.get();
    for (size_t i = 0; i < kFence; ++i) {
      CHECK(untouched(all[i]) && untouched(all[all.size() - 1 - i]));
    }
    return {all.begin() + kFence, all.end() - kFence};
  }
  static bool untouched(const T& value) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(&value);
    return std::all_of(bytes, bytes + sizeof(T), [](unsigned char byte) { return byte == 0xFF; });
  }
  T* data() const { return all_.data() + kFence; }

 private:
  static constexpr size_t kFence = 64;
  size_t count_;
  gpu::Array<T> all_;
};

struct Dot {
  double value = 0, magnitude = 0, largest = 0;  // sum, sum of |terms|, largest |term|

  // Of float32 sums, and of inputs that float32 may have rounded to the neighbour in T.
  template <class T>
  double tolerance() const {
    return 2e-5 * magnitude + 2 * kStep<T> * largest + 1e-30;
  }
};

template <class T>
Dot dot(const std::vector<T>& matrix, int64_t row, const double* input, int64_t width) {
  Dot sum;
  for (int64_t i = 0; i < width; ++i) {
    const double term = static_cast<float>(matrix[row * width + i]) * input[i];
    sum.value += term;
    sum.magnitude += std::fabs(term);
    sum.largest = std::max(sum.largest, std::fabs(term));
  }
  return sum;
}

template <class T>
struct Problem {
  Sizes sizes;
  int batch, part_count;
  std::vector<SequenceState> states;
  std::vector<float> x, parts;  // parts: (part_count, kPartPitch)
  std::vector<double> whole;    // x and its parts
  std::vector<T> norm_weight, norm_bias;
  std::vector<double> normed;  // rounded to T
  std::vector<double> folded;  // not so, where the norm is folded into the product
  Fenced<SequenceState> device_states;
  Fenced<float> device_x, device_parts;
  Fenced<T> device_norm_weight, device_norm_bias;
  int step = 1;  // outputs that are checked are this far apart
  int rows_of_block = 0;

  Problem(const Sizes& sizes_, int batch_, unsigned seed, int part_count_ = 0)
      : sizes(sizes_),
        batch(batch_),
        part_count(part_count_),
        states(batch),
        x(gpu::normal<float>(static_cast<size_t>(batch) * sizes.width, seed, 2.0f)),
        parts(gpu::normal<float>(static_cast<size_t>(part_count) * kPartPitch, seed + 3)),
        whole(x.size()),
        norm_weight(gpu::normal<T>(sizes.width, seed + 1)),
        norm_bias(gpu::normal<T>(sizes.width, seed + 2, 0.3f)),
        normed(x.size()),
        folded(x.size()),
        device_states(batch),
        device_x(x.size()),
        device_parts(parts.size()),
        device_norm_weight(norm_weight),
        device_norm_bias(norm_bias) {
    const int width = sizes.width;
    for (int row = 0; row < batch; ++row) {
      SequenceState& state = states[row];
      state.history = row % 2 == 0 ? 3000000 + 1000 * row : 256;
      state.last = state.history + (row * 3 + seed) % 8;
      state.compressed = -1;
      state.live = row % 3 == 1 ? 0 : 1 + row % 2;
      float* const values = &x[static_cast<size_t>(row) * width];
      if (row % 4 == 0) values[0] = 500;  // the value that the kernel measures from
      for (int i = 0; row % 4 == 3 && i < width; ++i) values[i] += 30;  // 15 deviations
      double* const sums = &whole[static_cast<size_t>(row) * width];
      for (int i = 0; i < width; ++i) {
        sums[i] = values[i];
        for (int p = 0; p < part_count; ++p) sums[i] += parts[p * kPartPitch + i];
      }
      double mean = 0, variance = 0;
      for (int i = 0; i < width; ++i) mean += sums[i] / width;
      for (int i = 0; i < width; ++i) variance += (sums[i] - mean) * (sums[i] - mean) / width;
      for (int i = 0; i < width; ++i) {
        const double unit = (sums[i] - mean) / std::sqrt(variance + 1e-5);
        const double w = static_cast<float>(norm_weight[i]), b = static_cast<float>(norm_bias[i]);
        const size_t at = static_cast<size_t>(row) * width + i;
        normed[at] = static_cast<float>(T(static_cast<float>(unit * w + b)));
        folded[at] = unit * w + b;
      }
      if (state.live == 0) std::fill(values, values + width, NAN);
    }
    device_states.set(states);
    device_x.set(x);
    for (int p = 0; p < part_count; ++p) {  // nobody reads what lies behind a row
      std::fill_n(parts.begin() + p * kPartPitch + width, kPartPitch - width, NAN);
    }
    device_parts.set(parts);
    if (static_cast<int64_t>(batch) * width > 5000) step = 7;
  }

  template <class Step>
  Step filled() const {
    Step p;
    p.dtype = kType<T>;
    p.batch = batch;
    p.state = device_states.data();
    p.rows_of_block = rows_of_block;
    return p;
  }
  template <class Step>
  Step with_norm() const {
    Step p = filled<Step>();
    p.x = device_x.data();
    p.hidden_size = sizes.width;
    p.norm = {device_norm_weight.data(), device_norm_bias.data(), 1e-5f};
    return p;
  }
  Parts parts_of_x() const { return {device_parts.data(), part_count}; }
  bool live(int row) const { return states[row].live != 0; }
  const double* of_row(int row, bool in_product) const {
    return &(in_product ? folded : normed)[static_cast<size_t>(row) * sizes.width];
  }
  // Of the kernel that the step takes.
  const double* row_for(const HeadStep&, int row) const { return of_row(row, batch == 1); }
  template <class Step>
  const double* row_for(const Step& p, int row) const {
    return of_row(row, batch == 1 || few_in_block(p));
  }
  // Some outputs, the first and the last among them.
  std::vector<int> checked(int count, int multiple = 1) const {
    std::vector<int> outputs;
    for (int i = 0; i < count; i += step * multiple) outputs.push_back(i);
    if (outputs.back() != count - multiple) outputs.push_back(count - multiple);
    return outputs;
  }
};

const Launch kPlain{};

__global__ void probe() {}
bool has_clusters() { return compiled_for(probe, 90); }  // which the MLP's kernel needs

template <class T>
void test_project(Problem<T>& problem, bool follows_history, unsigned seed) {
  const Sizes& s = problem.sizes;
  const int d = s.head_dim, queries = s.query_heads * d, keys = s.kv_heads * d;
  const int outputs = queries + 2 * keys, capacity = 9, batch = problem.batch;
  if (follows_history) {
    for (auto& state : problem.states) {
      state.last %= 8;
      state.history = state.last / 2;
    }
    problem.device_states.set(problem.states);
  }
  const auto weight = gpu::normal<T>(static_cast<size_t>(outputs) * s.width, seed, 0.1f);
  const auto bias = gpu::normal<T>(outputs, seed + 1);
  const Fenced<T> device_weight(weight), device_bias(bias);
  const int64_t head_stride = int64_t{capacity} * d, stride = s.kv_heads * head_stride + 16;
  const Fenced<T> device_keys(batch * stride), device_values(batch * stride);
  const Fenced<float> device_query(static_cast<size_t>(batch) * queries);

  auto p = problem.template with_norm<ProjectStep>();
  p.parts = problem.parts_of_x();
  p.weight = device_weight.data();
  p.bias = device_bias.data();
  p.query_heads = s.query_heads;
  p.kv_heads = s.kv_heads;
  p.head_dim = d;
  std::vector<float2> rotations;  // any that are no plain numbers
  for (int i = 0; i < batch * d / 2; ++i)
    rotations.push_back({std::cos(float(i)), std::sin(float(i))});
  const gpu::Array<float2> device_rotations(rotations);
  p.rotations = device_rotations.data();
  p.query = device_query.data();
  p.new_rows = {device_keys.data(), device_values.data(), stride, head_stride, follows_history};
  project_step(p, kPlain);

  const auto query = device_query.get();
  const auto new_keys = device_keys.get(), new_values = device_values.get();
  for (int row = 0; row < batch; ++row) {
    const SequenceState& state = problem.states[row];
    if (!problem.live(row)) {
      for (int i = 0; i < queries; ++i) CHECK(Fenced<float>::untouched(query[row * queries + i]));
      for (int64_t i = row * stride; i < (row + 1) * stride; ++i) {
        CHECK(Fenced<T>::untouched(new_keys[i]) && Fenced<T>::untouched(new_values[i]));
      }
      continue;
    }
    const int64_t slot = state.last - (follows_history ? 0 : state.history);
    for (int64_t i = 0; i < stride; ++i) {
      const bool written = i < stride - 16 && i / d % capacity == slot;
      CHECK(Fenced<T>::untouched(new_keys[row * stride + i]) != written);
      CHECK(Fenced<T>::untouched(new_values[row * stride + i]) != written);
    }
    for (const int output : problem.checked(outputs, 2)) {
      const Dot a = dot(weight, output, problem.row_for(p, row), s.width);
      const Dot b = dot(weight, output + 1, problem.row_for(p, row), s.width);
      double first = a.value + static_cast<float>(bias[output]);
      double second = b.value + static_cast<float>(bias[output + 1]);
      double tolerance =
          a.tolerance<T>() + b.tolerance<T>() + 1e-5 * (std::fabs(first) + std::fabs(second));
      if (output < queries + keys) {
        const float2 by = rotations[(row * d + output % d) / 2];
        const double x = first, y = second;
        first = x * by.x - y * by.y;
        second = x * by.y + y * by.x;
      }
      if (output < queries) {
        const double scale = 1.4426950408889634 / std::sqrt(static_cast<double>(d));
        CHECK_CLOSE(query[row * queries + output], first * scale, tolerance * scale);
        CHECK_CLOSE(query[row * queries + output + 1], second * scale, tolerance * scale);
        continue;
      }
      const bool is_key = output < queries + keys;
      const int within = output - queries - (is_key ? 0 : keys);
      const int64_t at = row * stride + within / d * head_stride + slot * d + within % d;
      const auto& rows = is_key ? new_keys : new_values;
      tolerance += kStep<T> * (std::fabs(first) + std::fabs(second));
      CHECK_CLOSE(static_cast<float>(rows[at]), first, tolerance);
      CHECK_CLOSE(static_cast<float>(rows[at + 1]), second, tolerance);
    }
  }
}

template <class T>
void test_add(const Problem<T>& problem, int inputs, bool with_bias, unsigned seed) {
  const int outputs = problem.sizes.width, batch = problem.batch;
  const auto weight = gpu::normal<T>(static_cast<size_t>(outputs) * inputs, seed, 0.1f);
  const auto bias = gpu::normal<T>(outputs, seed + 1);
  auto input = gpu::normal<T>(static_cast<size_t>(batch) * inputs, seed + 2);
  for (int row = 0; row < batch; ++row) {
    if (problem.live(row)) continue;
    std::fill_n(input.begin() + int64_t{row} * inputs, inputs, T(NAN));
  }
  const Fenced<T> device_weight(weight), device_bias(bias), device_input(input);
  const Fenced<float> device_x(problem.x);

  auto p = problem.template filled<AddStep>();
  p.input = device_input.data();
  p.weight = device_weight.data();
  p.bias = with_bias ? device_bias.data() : nullptr;
  p.inputs = inputs;
  p.outputs = outputs;
  p.x = device_x.data();
  p.parts = problem.parts_of_x();
  add_step(p, kPlain);

  const auto x = device_x.get();
  const auto exact = gpu::doubles(input);
  for (int row = 0; row < batch; ++row) {
    for (const int output : problem.checked(outputs)) {
      const size_t at = static_cast<size_t>(row) * outputs + output;
      if (!problem.live(row)) {
        CHECK(std::memcmp(&x[at], &problem.x[at], sizeof(float)) == 0);
        continue;
      }
      const Dot sum = dot(weight, output, &exact[static_cast<size_t>(row) * inputs], inputs);
      const double added = with_bias ? static_cast<float>(bias[output]) : 0.0;
      CHECK_CLOSE(x[at], problem.whole[at] + sum.value + added,
                  1e-5 * (sum.magnitude + std::fabs(problem.x[at]) + std::fabs(added) +
                          problem.part_count));
    }
  }
}

template <class T>
void test_gate(const Problem<T>& problem, unsigned seed) {
  const Sizes& s = problem.sizes;
  const size_t count = static_cast<size_t>(s.intermediate) * s.width;
  const auto gate = gpu::normal<T>(count, seed, 0.1f), up = gpu::normal<T>(count, seed + 1, 0.1f);
  const Fenced<T> device_gate(gate), device_up(up);
  const Fenced<T> device_hidden(static_cast<size_t>(problem.batch) * s.intermediate);

  auto p = problem.template with_norm<GateStep>();
  p.intermediate_size = s.intermediate;
  p.gate = device_gate.data();
  p.up = device_up.data();
  p.hidden = device_hidden.data();
  gate_step(p, kPlain);

  const auto hidden = device_hidden.get();
  for (int row = 0; row < problem.batch; ++row) {
    for (int i = 0; i < s.intermediate; ++i) {
      CHECK(Fenced<T>::untouched(hidden[static_cast<size_t>(row) * s.intermediate + i]) !=
            problem.live(row));
    }
    if (!problem.live(row)) continue;
    for (const int output : problem.checked(s.intermediate)) {
      const Dot g = dot(gate, output, problem.row_for(p, row), s.width);
      const Dot u = dot(up, output, problem.row_for(p, row), s.width);
      const double silu = g.value / (1 + std::exp(-g.value)), product = silu * u.value;
      const double got =
          static_cast<float>(hidden[static_cast<size_t>(row) * s.intermediate + output]);
      CHECK_CLOSE(got, product,
                  1.1 * g.tolerance<T>() * (std::fabs(u.value) + u.tolerance<T>()) +
                      std::fabs(silu) * u.tolerance<T>() + kStep<T> * std::fabs(product) + 1e-7);
    }
  }
}

// Gate, up and down in one kernel, where the device and the sizes allow it.
template <class T>
void test_mlp(const Problem<T>& problem, unsigned seed) {
  const Sizes& s = problem.sizes;
  const size_t count = static_cast<size_t>(s.intermediate) * s.width;
  const auto gate = gpu::normal<T>(count, seed, 0.1f), up = gpu::normal<T>(count, seed + 1, 0.1f);
  const auto down = gpu::normal<T>(count, seed + 2, 0.1f);
  const Fenced<T> device_gate(gate), device_up(up), device_down(down);

  auto p = problem.template with_norm<MlpStep>();
  p.intermediate_size = s.intermediate;
  p.gate = device_gate.data();
  p.up = device_up.data();
  p.down = device_down.data();
  const int parts = mlp_parts(p);
  CHECK((parts == 0) == (!has_clusters() || s.width > kPartPitch));
  if (parts == 0) return;
  const Fenced<float> device_parts(static_cast<size_t>(parts) * kPartPitch);
  p.parts = device_parts.data();
  mlp_row(p, kPlain);

  const auto got = device_parts.get();
  for (int part = 0; part < parts; ++part) {
    for (int i = 0; i < kPartPitch; ++i) {
      const bool written = problem.live(0) && i < s.width;
      CHECK(Fenced<float>::untouched(got[part * kPartPitch + i]) != written);
    }
  }
  if (!problem.live(0)) return;
  std::vector<double> hidden;
  for (int i = 0; i < s.intermediate; ++i) {
    const double g = dot(gate, i, problem.of_row(0, true), s.width).value;
    const double u = dot(up, i, problem.of_row(0, true), s.width).value;
    hidden.push_back(static_cast<float>(T(static_cast<float>(g / (1 + std::exp(-g)) * u))));
  }
  for (int output = 0; output < s.width; ++output) {
    const Dot sum = dot(down, output, hidden.data(), s.intermediate);
    double all = 0;
    for (int part = 0; part < parts; ++part) all += got[part * kPartPitch + output];
    CHECK_CLOSE(all, sum.value, sum.tolerance<T>());
  }
}

// Checks candidates against the logits themselves.
void check_candidates(const std::vector<Candidate>& candidates, const std::vector<float>& logits) {
  size_t expected = 0;
  for (size_t i = 0; i < logits.size() && !std::isnan(logits[expected]); ++i) {
    if (std::isnan(logits[i]) || logits[i] > logits[expected]) expected = i;
  }
  Candidate best = candidates[0];
  for (const Candidate& c : candidates) {
    CHECK(c.token >= 0 && c.token < static_cast<int>(logits.size()));
    CHECK(std::memcmp(&c.logit, &logits[c.token], sizeof(float)) == 0);
    const bool first = c.token < best.token;
    if (std::isnan(best.logit)) {
      if (std::isnan(c.logit) && first) best = c;
    } else if (std::isnan(c.logit) || c.logit > best.logit || (c.logit == best.logit && first)) {
      best = c;
    }
  }
  CHECK(best.token == static_cast<int>(expected));
}

enum class Embed { random, equal, poisoned };

template <class T>
void test_head(const Problem<T>& problem, Embed kind, unsigned seed) {
  const Sizes& s = problem.sizes;
  auto embed = gpu::normal<T>(static_cast<size_t>(s.vocab) * s.width, seed, 0.1f);
  if (kind == Embed::equal) std::fill(embed.begin(), embed.end(), T(0.5f));
  const int poison = s.vocab * 2 / 3;
  if (kind == Embed::poisoned) embed[static_cast<size_t>(poison) * s.width + 3] = T(NAN);
  const Fenced<T> device_embed(embed);
  const size_t blocks = head_candidates(s.vocab);
  const Fenced<float> device_logits(static_cast<size_t>(problem.batch) * s.vocab);
  const Fenced<Candidate> device_candidates(problem.batch * blocks);

  auto p = problem.template with_norm<HeadStep>();
  p.parts = problem.parts_of_x();
  p.vocab_size = s.vocab;
  p.embed = device_embed.data();
  p.logits = device_logits.data();
  p.candidates = device_candidates.data();
  head_step(p, kPlain);

  const auto logits = device_logits.get();
  const auto candidates = device_candidates.get();
  for (int row = 0; row < problem.batch; ++row) {
    const std::vector<float> own(logits.begin() + int64_t{row} * s.vocab,
                                 logits.begin() + int64_t{row + 1} * s.vocab);
    if (!problem.live(row)) {
      for (const float logit : own) CHECK(Fenced<float>::untouched(logit));
      for (size_t i = 0; i < blocks; ++i) {
        CHECK(Fenced<Candidate>::untouched(candidates[row * blocks + i]));
      }
      continue;
    }
    for (int token = 0; token < s.vocab; ++token) {
      CHECK(std::isnan(own[token]) == (kind == Embed::poisoned && token == poison));
    }
    check_candidates({candidates.begin() + row * blocks, candidates.begin() + (row + 1) * blocks},
                     own);
    if (kind != Embed::random) continue;
    std::vector<int> tokens = problem.checked(s.vocab);
    if (tokens.size() > 1000) {
      for (size_t i = 0; i < 1000; ++i) tokens[i] = tokens[i * tokens.size() / 1000];
      tokens[999] = s.vocab - 1;
      tokens.resize(1000);
    }
    for (const int token : tokens) {
      const Dot sum = dot(embed, token, problem.row_for(p, row), s.width);
      CHECK_CLOSE(own[token], sum.value, sum.tolerance<T>());
    }
  }
}

template <class T>
void test(const Sizes& sizes, const std::vector<int>& batches, unsigned seed) {
  for (const int batch : batches) {
    Problem<T> problem(sizes, batch, seed += 100);
    for (const int rows : {8, 32}) {  // whatever is chosen where it is left open
      if (batch == 1) break;
      problem.rows_of_block = rows;
      test_add(problem, sizes.intermediate, true, seed + 1);
      if (sizes.width < 100) test_add(problem, 1608, true, seed + 2);  // more than are in flight
      test_gate(problem, seed + 3);
      test_project(problem, false, seed + 7);
    }
    problem.rows_of_block = 0;
    test_add(problem, sizes.query_heads * sizes.head_dim, true, seed + 10);
    test_add(problem, sizes.intermediate, false, seed + 20);
    test_gate(problem, seed + 30);
    test_head(problem, Embed::random, seed + 40);
    if (sizes.vocab < 10000) {
      test_head(problem, Embed::equal, seed + 50);
      test_head(problem, Embed::poisoned, seed + 60);
    }
    test_project(problem, false, seed + 70);
    test_project(problem, true, seed + 80);
    if (batch > 1) continue;
    test_mlp(problem, seed + 90);
    // What the one leaves, the others add.
    for (const int parts : {1, kFewParts, kMostParts}) {
      if (sizes.width > kPartPitch) break;
      Problem<T> with_parts(sizes, 1, seed += 100, parts);
      test_add(with_parts, sizes.query_heads * sizes.head_dim, true, seed + 10);
      test_project(with_parts, false, seed + 20);
      if (has_clusters()) test_head(with_parts, Embed::random, seed + 30);
    }
  }
}

// A sequence that has stopped keeps everything, also when it is the only one.
void test_stopped() {
  const Sizes sizes{72, 2, 1, 36, 40, 53};
  Problem<bf16> problem(sizes, 1, 1);
  problem.states[0].live = 0;
  problem.device_states.set(problem.states);
  test_add(problem, 40, false, 2);
  test_gate(problem, 3);
  test_mlp(problem, 6);
  test_head(problem, Embed::random, 4);
  test_project(problem, false, 5);
  Problem<bf16> wide({1288, 6, 2, 36, 40, 53}, 1, 1);
  wide.states[0].live = 0;
  wide.device_states.set(wide.states);
  test_add(wide, 40, false, 2);
  test_gate(wide, 3);
  test_project(wide, false, 5);
}

// Several copies of random weights, so that a kernel finds as few of them in L2 as in a model.
class Copies {
 public:
  Copies(size_t count, size_t copies)
      : count_((count + 63) / 64 * 64), copies_(copies), all_(count_ * copies) {
    gpu::randomise(all_);
  }
  const bf16* next() { return all_.data() + next_++ % copies_ * count_; }

 private:
  size_t count_, copies_, next_ = 0;
  gpu::Array<bf16> all_;
};

void bench(const char* name, const Sizes& s, int batch) {
  constexpr int kLayers = 8;
  const int64_t heads = s.query_heads + 2 * s.kv_heads, qkv = heads * s.head_dim;
  const int64_t width = s.width, vocab = s.vocab;
  const int64_t mlp_size = 3 * s.intermediate * width;
  const int64_t sizes[] = {
      qkv * width, width * width, 2 * s.intermediate * width, s.intermediate * width, vocab * width,
      mlp_size,    mlp_size};
  std::vector<SequenceState> states(batch);
  for (auto& state : states) {
    state.last = 1000;
    state.history = 768;
    state.live = 1;
  }
  const gpu::Array<SequenceState> state(states);
  const gpu::Array<float> x(gpu::normal<float>(batch * width, 1));
  const gpu::Array<bf16> parameters(gpu::normal<bf16>(qkv, 2));
  const gpu::Array<bf16> input(gpu::normal<bf16>(int64_t{batch} * s.intermediate, 3));
  const gpu::Array<bf16> cache(int64_t{2} * batch * s.kv_heads * 256 * s.head_dim);
  const gpu::Array<bf16> hidden(int64_t{batch} * s.intermediate);
  const gpu::Array<float> query(batch * width), logits(batch * vocab);
  const gpu::Array<Candidate> candidates(int64_t{batch} * head_candidates(s.vocab));
  const gpu::Array<float> parts(gpu::normal<float>(kMostParts * kPartPitch, 4));

  const auto with_norm = [&](auto p) {
    p.batch = batch;
    p.state = state.data();
    p.x = x.data();
    p.hidden_size = s.width;
    p.norm = {parameters.data(), parameters.data(), 1e-5f};
    return p;
  };
  auto project = with_norm(ProjectStep{});
  project.bias = parameters.data();
  project.query_heads = s.query_heads;
  project.kv_heads = s.kv_heads;
  project.head_dim = s.head_dim;
  const gpu::Array<float2> rotations(std::vector<float2>(batch * s.head_dim / 2, {0.6f, 0.8f}));
  project.rotations = rotations.data();
  project.query = query.data();
  const int64_t head_stride = 256 * s.head_dim;
  project.new_rows = {cache.data(), cache.data() + cache.size() / 2, s.kv_heads * head_stride,
                      head_stride, false};
  AddStep out;
  out.batch = batch;
  out.state = state.data();
  out.input = input.data();
  out.bias = parameters.data();
  out.inputs = out.outputs = s.width;
  out.x = x.data();
  AddStep down = out;
  down.bias = nullptr;
  down.inputs = s.intermediate;
  auto gate = with_norm(GateStep{});
  gate.intermediate_size = s.intermediate;
  gate.hidden = hidden.data();
  auto mlp = with_norm(MlpStep{});
  mlp.intermediate_size = s.intermediate;
  mlp.parts = parts.data();
  auto head = with_norm(HeadStep{});
  head.vocab_size = s.vocab;
  head.logits = logits.data();
  head.candidates = candidates.data();

  // `copies` of the weights, in the order of `sizes`.
  enum { kQkv, kOut, kGate, kDown, kHead, kTwo, kMlp, kKernels };
  const char* const kernels[] = {"qkv", "out", "gate/up", "down", "head", "gate/up, then down",
                                 "mlp"};
  const bool has_mlp = batch == 1 && has_clusters() && mlp_parts(mlp) > 0;
  const int last = has_mlp ? kKernels : kTwo + 1;
  std::vector<std::unique_ptr<Copies>> weights(kKernels);
  const auto run = [&](int kernel, cudaStream_t stream) {
    const Launch how{stream, true};
    const bf16* const weight = weights[kernel]->next();
    project.weight = out.weight = down.weight = gate.gate = head.embed = mlp.gate = weight;
    gate.up = mlp.up = weight + s.intermediate * width;
    if (kernel >= kTwo) mlp.down = down.weight = weight + 2 * s.intermediate * width;
    if (kernel == kQkv) project_step(project, how);
    if (kernel == kOut) add_step(out, how);
    if (kernel == kGate || kernel == kTwo) gate_step(gate, how);
    if (kernel == kDown || kernel == kTwo) add_step(down, how);
    if (kernel == kHead) head_step(head, how);
    if (kernel == kMlp) mlp_row(mlp, how);
  };
  const auto title = [&](const std::string& what) {
    return std::string(name) + " batch " + std::to_string(batch) + " " + what;
  };
  for (const bool cold : {false, true}) {
    for (int kernel = 0; kernel < last; ++kernel) {
      const size_t bytes = sizes[kernel] * sizeof(bf16);
      weights[kernel] =
          std::make_unique<Copies>(sizes[kernel], cold ? (150u << 20) / bytes + 1 : 1);
      const double us = gpu::microseconds([&](cudaStream_t stream) { run(kernel, stream); }, 200);
      gpu::report(title(kernels[kernel]) + (cold ? ", weights from memory" : ", weights from L2"),
                  us, static_cast<double>(bytes), 2.0 * batch * sizes[kernel]);
    }
  }
  if (last > kMlp) {  // the same with what an MLP leaves to be added
    project.parts = out.parts = head.parts = {parts.data(), mlp_parts(mlp)};
    for (const int kernel : {kQkv, kOut, kHead}) {
      weights[kernel] = std::make_unique<Copies>(sizes[kernel], 1);
      const double us = gpu::microseconds([&](cudaStream_t stream) { run(kernel, stream); }, 200);
      gpu::report(title(kernels[kernel]) + " and parts, weights from L2", us,
                  static_cast<double>(sizes[kernel] * sizeof(bf16)), 2.0 * sizes[kernel]);
    }
    project.parts = out.parts = head.parts = {};
  }
  // Whole tokens, in which the kernels after the MLP add what it left.
  for (int mlp_kernel = kTwo; mlp_kernel < last; ++mlp_kernel) {
    double all = 0;
    for (const int kernel : {int{kQkv}, int{kOut}, int{kHead}, mlp_kernel}) {
      const int copies = kernel == kHead ? 1 : kLayers;
      weights[kernel] = std::make_unique<Copies>(sizes[kernel], copies);
      all += static_cast<double>(copies * sizes[kernel]);
    }
    const int count = mlp_kernel == kTwo ? 0 : mlp_parts(mlp);
    const double us = gpu::microseconds(
        [&](cudaStream_t stream) {
          for (int layer = 0; layer < kLayers; ++layer) {
            project.parts = out.parts = {parts.data(), layer == 0 ? 0 : count};
            for (const int kernel : {int{kQkv}, int{kOut}, mlp_kernel}) run(kernel, stream);
          }
          head.parts = {parts.data(), count};
          run(kHead, stream);
        },
        20);
    gpu::report(title("8 layers and head, without attention, ") + kernels[mlp_kernel], us,
                all * sizeof(bf16), 2.0 * batch * all);
  }
}

// The products of eight layers one after the other, and the head.
void bench_wide(const char* name, const Sizes& s) {
  constexpr int kLayers = 8;
  const int width = s.width, inner = s.intermediate;
  const int outputs = (s.query_heads + 2 * s.kv_heads) * s.head_dim;
  const int64_t qkv = int64_t{outputs} * width, out = int64_t{width} * width;
  const int64_t gate = int64_t{inner} * width, head = int64_t{s.vocab} * width;
  const int64_t layer = qkv + out + 3 * gate;
  const gpu::Array<bf16> weights(kLayers * layer + head);
  gpu::randomise(weights);
  SequenceState live;
  live.last = 1000, live.history = 768, live.live = 1;
  const gpu::Array<SequenceState> state(std::vector<SequenceState>{live});
  const gpu::Array<float> x(gpu::normal<float>(width, 1)), query(width), logits(s.vocab);
  const gpu::Array<bf16> parameters(gpu::normal<bf16>(outputs, 2));
  const gpu::Array<bf16> input(gpu::normal<bf16>(inner, 3)), hidden(inner);
  const int64_t head_stride = 256 * s.head_dim;
  const gpu::Array<bf16> cache(2 * s.kv_heads * head_stride);
  const gpu::Array<float2> rotations(std::vector<float2>(s.head_dim / 2, {0.6f, 0.8f}));
  const gpu::Array<Candidate> candidates(head_candidates(s.vocab));
  const Norm norm{parameters.data(), parameters.data(), 1e-5f};
  const auto with_norm = [&](auto p) {
    p.state = state.data();
    p.x = x.data();
    p.hidden_size = width;
    p.norm = norm;
    return p;
  };
  const auto token = [&](cudaStream_t stream) {
    const Launch how{stream, true, 1, kAllShared};
    const bf16* at = weights.data();
    for (int l = 0; l < kLayers; ++l, at += layer) {
      auto project = with_norm(ProjectStep{});
      project.weight = at;
      project.bias = parameters.data();
      project.query_heads = s.query_heads;
      project.kv_heads = s.kv_heads;
      project.head_dim = s.head_dim;
      project.rotations = rotations.data();
      project.query = query.data();
      project.new_rows = {cache.data(), cache.data() + cache.size() / 2, 0, head_stride, false};
      project_step(project, how);
      AddStep add;
      add.state = state.data();
      add.input = input.data();
      add.weight = at + qkv;
      add.bias = parameters.data();
      add.inputs = add.outputs = width;
      add.x = x.data();
      add_step(add, how);
      auto gated = with_norm(GateStep{});
      gated.intermediate_size = inner;
      gated.gate = at + qkv + out;
      gated.up = at + qkv + out + gate;
      gated.hidden = hidden.data();
      gate_step(gated, how);
      add.weight = at + qkv + out + 2 * gate;
      add.bias = nullptr;
      add.inputs = inner;
      add_step(add, how);
    }
    auto last = with_norm(HeadStep{});
    last.vocab_size = s.vocab;
    last.embed = at;
    last.logits = logits.data();
    last.candidates = candidates.data();
    head_step(last, how);
  };
  const double us = gpu::microseconds(token, 20);
  const double count = static_cast<double>(weights.size());
  gpu::report(std::string(name) + " 8 layers and head, without attention", us, 2 * count,
              2 * count);
}

}  // namespace

int main(int argc, char** argv) {
  const Sizes product{432, 12, 12, 36, 1280, 50257}, second{512, 8, 8, 64, 1536, 50257};
  if (argc > 2 && std::string(argv[2]) == "wide") {
    bench_wide("1.3B", {2048, 32, 8, 64, 6144, 50257});
    bench_wide("7B", {4096, 32, 8, 128, 14336, 32000});
    return 0;
  }
  if (argc > 1 && std::string(argv[1]) == "bench") {
    for (const int batch : {1, 8, 32}) bench("41M", product, batch);
    for (const int batch : {1, 8, 32}) bench("D512", second, batch);
    return 0;
  }
  const std::vector<int> all{1, 3, 8, 9, 32, 40}, some{1, 8, 40};
  test_stopped();
  test<bf16>({72, 2, 1, 36, 40, 11}, all, 1000);
  test<f16>({72, 2, 1, 36, 40, 11}, all, 2000);
  test<bf16>({56, 4, 2, 32, 24, 53}, all, 3000);
  test<f16>({56, 3, 1, 40, 24, 53}, all, 4000);
  test<bf16>(product, {1, 9, 32}, 5000);
  test<f16>(product, {8}, 6000);
  test<bf16>({512, 8, 2, 64, 1536, 1003}, some, 7000);
  test<f16>({1024, 8, 4, 128, 1280, 2000}, some, 8000);
  test<bf16>({2056, 3, 1, 80, 8, 4999}, {1, 3, 20}, 9000);  // fewer rows fit in shared memory
  // Wide ones, of all widths of a thread's part of a row.
  test<bf16>({1288, 6, 2, 36, 1000, 53}, {1}, 10000);
  test<f16>({2048, 8, 2, 128, 2200, 53}, {1}, 11000);
  test<f16>({4104, 8, 1, 40, 136, 53}, {1}, 12000);
  test_gate(Problem<bf16>({4096, 1, 1, 32, 9000, 53}, 1, 2), 12500);  // many rounds of the ring
  for (const int inputs : {8200, 14336, 16384}) {
    test_add(Problem<bf16>({1032, 1, 1, 32, 8, 53}, 1, 3), inputs, true, 13000);
    test_add(Problem<f16>({1160, 1, 1, 32, 8, 53}, 1, 4), inputs, false, 14000);
  }
  std::puts("ok");
  return 0;
}
