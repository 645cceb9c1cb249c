// decode_attention() against float64, and its speed.
#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/attention/decode_attention.h"
#include "cuda/attention/speeds.h"
#include "gpu.h"

using namespace tlinformer;
using namespace tlinformer::cuda;

namespace {

cudaStream_t stream;

struct Lengths {
  int64_t history;
  int compressed;
  int64_t window;
  int live;
};

struct Case {
  int d, query_heads, kv_heads;
  ContextRows context_rows;
  bool follows;
  std::vector<Lengths> sequences;
  float query_scale = 1;
  int blocks = 0;
  bool planned = false;  // most rows are known
};

struct Random {
  std::mt19937_64 generator;
  int64_t below(int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); }
  int64_t rows(int64_t most) {  // as many short as long ones
    return static_cast<int64_t>(std::exp2(std::log2(most + 1.0) * below(1000) / 1000.0));
  }
};

template <class T>
const std::vector<T>& pool() {
  static const std::vector<T> values = gpu::normal<T>(1 << 16, 1);
  return values;
}

template <class T>
T nan() {
  T x;
  std::memset(&x, 0xFF, sizeof x);
  return x;
}

// Keys and values of a layer; NaN where no row has been filled in.
template <class T>
struct Region {
  int d;
  int64_t head_stride, sequence_stride;
  std::vector<T> keys, values;

  Region(int sequences, int heads, int64_t capacity, int head_dim)
      : d(head_dim),
        head_stride((capacity * d + 7) / 8 * 8),
        sequence_stride(heads * head_stride + 8),
        keys(sequences * sequence_stride, nan<T>()),
        values(keys) {}

  int64_t at(int sequence, int head, int64_t row) const {
    return sequence * sequence_stride + head * head_stride + row * d;
  }
  void fill(int sequence, int heads, int64_t begin, int64_t end, Random& random) {
    for (int head = 0; head < heads; ++head) {
      for (std::vector<T>* to : {&keys, &values}) {
        for (int64_t i = at(sequence, head, begin); i < at(sequence, head, end);) {
          const int64_t count = std::min<int64_t>(at(sequence, head, end) - i, 1000);
          const T* from = &pool<T>()[random.below(pool<T>().size() - count)];
          std::copy(from, from + count, &(*to)[i]);
          i += count;
        }
      }
    }
  }
};

template <class T>
struct Arrays {
  gpu::Array<T> keys, values;
  explicit Arrays(const Region<T>& from) : keys(from.keys), values(from.values) {}
};

template <class T>
CachedRows cached(const Arrays<T>& arrays, const Region<T>& region) {
  return {arrays.keys.data(), arrays.values.data(), region.sequence_stride, region.head_stride};
}

// Adds one group's softmax: the output, and the same of absolute values.
template <class T>
void attend(const float* query, const Region<T>& rows, int64_t at, int64_t count, double* output,
            double* magnitude) {
  if (count == 0) return;
  const int d = rows.d;
  std::vector<double> scores(count);
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (int64_t j = 0; j < count; ++j) {
    const T* key = &rows.keys[at + j * d];
    double score = 0;
    for (int i = 0; i < d; ++i) score += double{query[i]} * static_cast<float>(key[i]);
    scores[j] = score;
    top = std::max(top, score);
  }
  for (double& score : scores) sum += score = std::exp2(score - top);
  for (int64_t j = 0; j < count; ++j) {
    const T* value = &rows.values[at + j * d];
    const double weight = scores[j] / sum;
    for (int i = 0; i < d; ++i) {
      output[i] += weight * static_cast<float>(value[i]);
      magnitude[i] += weight * std::fabs(static_cast<float>(value[i]));
    }
  }
}

struct Copies {
  static constexpr int kMost = 3;
  const uint32_t* from[kMost];
  uint32_t* to[kMost];
  size_t words[kMost];
};

// Stands for the kernel before: lets the attention start, and is late with everything it reads.
__global__ void late_copies(Copies c) {
  let_next_start();
  wait_for_previous();
  const long long begin = clock64();
  while (clock64() - begin < 40000) continue;
  for (int k = 0; k < Copies::kMost; ++k)
    for (size_t i = threadIdx.x; i < c.words[k]; i += blockDim.x) c.to[k][i] = c.from[k][i];
}

template <class T>
void test(const Case& c, unsigned seed) {
  Random random{std::mt19937_64(seed)};
  const int batch = static_cast<int>(c.sequences.size()), d = c.d;
  int64_t most_context = 1, most_window = 1, most_new = 1;  // rows; of windows alone
  for (const Lengths& s : c.sequences) {
    most_context = std::max(most_context, std::max<int64_t>(s.history, s.compressed));
    most_window = std::max(most_window, s.window + 2 + (c.follows ? s.history : 0));
    most_new = std::max(most_new, s.window + 2);
  }
  Region<T> context(batch, c.kv_heads, most_context + random.below(9), d);
  Region<T> window(batch, c.kv_heads, most_window + random.below(9), d);
  std::vector<SequenceState> states;
  for (int s = 0; s < batch; ++s) {
    const Lengths& n = c.sequences[s];
    states.push_back({n.history + n.window - 1, n.history, n.compressed, n.live});
    const int64_t rows = c.context_rows == ContextRows::history ? n.history : n.compressed;
    context.fill(s, c.kv_heads, 0, rows, random);
    window.fill(s, c.kv_heads, 0, n.window + (c.follows ? n.history : 0), random);
  }
  const bool one_region = c.follows && c.context_rows == ContextRows::history;
  const Region<T>& context_region = one_region ? window : context;

  gpu::Array<SequenceState> device_states(states);
  Arrays<T> device_context(context), device_window(window);
  gpu::Array<float> query(int64_t{batch} * c.query_heads * d);
  gpu::Array<T> output(query.size());
  std::vector<char> zeros(decode_attention_scratch(batch, c.query_heads, d), 0);
  gpu::Array<char> scratch(zeros);

  DecodeAttention a;
  a.dtype = std::is_same_v<T, bf16> ? DType::bfloat16 : DType::float16;
  a.batch = batch;
  a.query_heads = c.query_heads;
  a.kv_heads = c.kv_heads;
  a.head_dim = d;
  a.query = query.data();
  a.output = output.data();
  a.state = device_states.data();
  a.context_rows = c.context_rows;
  if (c.context_rows != ContextRows::none)
    a.context = one_region ? cached(device_window, window) : cached(device_context, context);
  a.window = cached(device_window, window);
  a.window_follows_history = c.follows;
  a.most_rows = !c.planned && random.below(2) ? 0 : most_context + most_window;
  a.most_window_rows = !c.planned && random.below(2) ? 0 : most_new;
  a.scratch = scratch.data();
  a.blocks = c.blocks;

  const double epsilon = std::is_same_v<T, bf16> ? 1.0 / 256 : 1.0 / 2048;
  for (int step = 0; step < 3; ++step) {
    const std::vector<float> queries = gpu::normal<float>(
        query.size(), seed + 100 + step, c.query_scale * 1.4427f / std::sqrt(float(d)));
    query.set(queries);
    output.set(std::vector<T>(output.size(), T(77.0f)));
    if (step == 0) {
      decode_attention(a, {stream});
    } else {  // the next token; of some sequences life changes
      for (int s = 0; s < batch; ++s) {
        SequenceState& state = states[s];
        if (state.live != 0) {
          ++state.last;
          const int64_t row = state.last - (c.follows ? 0 : state.history);
          window.fill(s, c.kv_heads, row, row + 1, random);
        }
        if (batch > 1 && random.below(4) == 0) state.live = state.live == 0 ? 2 : 0;
      }
      const Arrays<T> new_rows(window);
      const gpu::Array<SequenceState> new_states(states);
      const Copies copies = {
          {reinterpret_cast<const uint32_t*>(new_states.data()),
           reinterpret_cast<const uint32_t*>(new_rows.keys.data()),
           reinterpret_cast<const uint32_t*>(new_rows.values.data())},
          {reinterpret_cast<uint32_t*>(device_states.data()),
           reinterpret_cast<uint32_t*>(device_window.keys.data()),
           reinterpret_cast<uint32_t*>(device_window.values.data())},
          {new_states.bytes() / 4, new_rows.keys.bytes() / 4, new_rows.values.bytes() / 4}};
      launch({stream, true}, late_copies, "late copies", dim3(1), dim3(1024), 0, copies);
      decode_attention(a, {stream, true});
      check(cudaDeviceSynchronize(), "decode attention");
    }
    check(cudaDeviceSynchronize(), "decode attention");

    const std::vector<T> outputs = output.get();
    std::vector<double> want(d), magnitude(d);
    for (int s = 0; s < batch; ++s) {
      const SequenceState& state = states[s];
      for (int h = 0; h < c.query_heads; ++h) {
        const int64_t row = int64_t{s} * c.query_heads + h;
        const int kv_head = h / (c.query_heads / c.kv_heads);
        std::fill(want.begin(), want.end(), 0.0);
        std::fill(magnitude.begin(), magnitude.end(), 0.0);
        if (state.live != 0) {
          const int64_t rows = c.context_rows == ContextRows::none      ? 0
                               : c.context_rows == ContextRows::history ? state.history
                                                                        : state.compressed;
          const int64_t first = c.follows ? state.history : 0;
          attend(&queries[row * d], context_region, context_region.at(s, kv_head, 0), rows,
                 want.data(), magnitude.data());
          attend(&queries[row * d], window, window.at(s, kv_head, first),
                 state.last - state.history + 1, want.data(), magnitude.data());
        }
        for (int i = 0; i < d; ++i) {
          const double got = static_cast<float>(outputs[row * d + i]);
          if (state.live == 0) {
            CHECK(got == 77.0);
          } else if (!(std::fabs(got - want[i]) <=
                       epsilon * std::fabs(want[i]) + 1e-4 * magnitude[i] + 1e-7)) {
            std::fprintf(stderr,
                         "d %d, heads %d/%d, context %d, seed %u, step %d, sequence %d (%lld + "
                         "%lld rows), head %d, element %d: %g, should be %g\n",
                         d, c.query_heads, c.kv_heads, static_cast<int>(c.context_rows), seed, step,
                         s, static_cast<long long>(state.history),
                         static_cast<long long>(state.last - state.history + 1), h, i, got,
                         want[i]);
            std::exit(1);
          }
        }
      }
    }
    // Arrivals are back at zero.
    const std::vector<char> counts = scratch.get();
    for (int i = 0; i < std::min(batch, 256) * c.query_heads * 4; ++i) CHECK(counts[i] == 0);
  }
}

template <class T>
void test_sizes() {
  unsigned seed = 10;
  Random random{std::mt19937_64(5)};
  const auto lengths = [&](int64_t most) {
    const int64_t history = random.below(5) == 0 ? 0 : random.rows(most);
    return Lengths{history, static_cast<int>(std::min(history, random.rows(most / 4))),
                   1 + random.rows(most / 4), random.below(4) == 0 ? 0 : 1};
  };
#define TLINFORMER_CASE(D) D,
  for (int d : {TLINFORMER_HEAD_SIZES(TLINFORMER_CASE)}) {
#undef TLINFORMER_CASE
    for (int group : {1, 2, 4}) {
      const int kv_heads = 4 / group;
      const int heads = kv_heads * group;
      const auto one = [&](int64_t history, int64_t window) {
        return std::vector<Lengths>{{history, static_cast<int>(history), window, 1}};
      };
      const auto three = [&](int64_t most) {
        return std::vector<Lengths>{lengths(most), lengths(most), lengths(most)};
      };
      const int64_t odd = 2 * random.rows(700) + 1;
      test<T>({d, heads, kv_heads, ContextRows::history, true, one(odd, 1 + random.below(300))},
              ++seed);
      test<T>({d, heads, kv_heads, ContextRows::none, true, one(odd, 1 + random.below(20))},
              ++seed);
      test<T>({d, heads, kv_heads, ContextRows::history, false, three(3000), 4}, ++seed);
      test<T>({d, heads, kv_heads, ContextRows::compressed, false, three(600)}, ++seed);
      test<T>({d, heads, kv_heads, ContextRows::history, true, three(1000), 1,
               1 + static_cast<int>(random.below(20))},
              ++seed);
      test<T>({d, heads, kv_heads, ContextRows::compressed, true, one(1, 1), 8}, ++seed);
      // So many heads that their rows have to follow one another through shared memory.
      if (d != 36 && d != 64 && d != 128) continue;
      std::vector<Lengths> some;
      for (int s = 0; s < 70; ++s) some.push_back(lengths(s % 10 == 0 ? 1000 : 40));
      some[0] = {1000 + random.below(9), 1, 100 + random.below(200), 1};
      test<T>({d, heads, kv_heads, ContextRows::history, group == 2, some, 1, 0, true}, ++seed);
    }
  }
  // Uneven and large groups of heads, and scores that rise and fall by thousands.
  test<T>({36, 3, 1, ContextRows::history, true, {{777, 0, 33, 1}}}, ++seed);
  test<T>({64, 10, 2, ContextRows::history, false, {{999, 0, 1, 2}, {3, 3, 3, 1}}}, ++seed);
  test<T>({128, 8, 1, ContextRows::compressed, false, {{1500, 1300, 256, 1}}}, ++seed);
  test<T>({36, 2, 2, ContextRows::history, true, {{2049, 0, 256, 1}}, 100}, ++seed);
  test<T>({96, 2, 1, ContextRows::history, true, {{2050, 0, 255, 1}}, 100}, ++seed);
  // None, all and many sequences live.
  test<T>({48, 2, 2, ContextRows::history, true, {{50, 0, 5, 0}}}, ++seed);
  std::vector<Lengths> many;
  for (int s = 0; s < 300; ++s) many.push_back(lengths(60));
  test<T>({32, 2, 1, ContextRows::history, true, many}, ++seed);
  // The last launch has a single sequence of them.
  many.resize(257);
  test<T>({36, 12, 12, ContextRows::history, true, many, 1, 0, true}, ++seed);
  // Of a batch: eight queries of a key/value head, and more, also where rows follow one another;
  // few heads, in clusters.
  many[0] = {900 + random.below(9), 1, 50 + random.below(50), 1};
  test<T>({36, 9, 1, ContextRows::history, true, many, 1, 0, true}, ++seed);
  test<T>({64, 8, 1, ContextRows::history, false, many, 1, 0, true}, ++seed);
  const std::vector<Lengths> few = {
      {3000 + random.below(9), 900, 200, 1}, {70, 70, 1, 1}, {0, 0, 33, 2}};
  test<T>({36, 9, 1, ContextRows::history, true, few, 1, 0, true}, ++seed);
  test<T>({128, 16, 2, ContextRows::compressed, false, few, 1, 0, true}, ++seed);
  test<T>({36, 12, 12, ContextRows::compressed, true, few, 1, 0, true}, ++seed);
}

// A long history, for single heads and for groups of heads in one pass, and in several.
template <class T>
void test_long(unsigned seed) {
  Random random{std::mt19937_64(seed)};
  const auto one = [&](int d, int heads, int kv_heads, bool follows) {
    const int64_t history = 16384 + random.below(3000);
    test<T>({d,
             heads,
             kv_heads,
             ContextRows::history,
             follows,
             {{history, 0, 1 + random.below(500), 1}},
             1,
             0,
             true},
            ++seed);
  };
  one(36, 12, 12, true);
  one(128, 32, 8, true);
  one(128, 32, 4, true);
  one(128, 16, 2, false);
  one(64, 20, 4, true);
  one(36, 6, 2, true);
  one(36, 27, 3, false);
  one(96, 24, 12, true);
  one(32, 40, 4, true);
}

// Offsets beyond 2^31 elements: keys of zeros weigh all values, which are equal, the same.
void test_offsets() {
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  const int64_t history = 20000001, rows = history + 10;
  if (free < static_cast<size_t>(5 * rows * 128 * 2)) return;
  gpu::Array<bf16> keys(2 * rows * 128), values(2 * rows * 128);
  check(cudaMemset(keys.data(), 0, keys.bytes()), "cudaMemset");
  check(cudaMemset(values.data(), 0x3F, values.bytes()), "cudaMemset");
  const gpu::Array<float> query(gpu::normal<float>(256, 3));
  const gpu::Array<bf16> output(256);
  const gpu::Array<SequenceState> state(std::vector<SequenceState>{{rows - 1, history, 0, 1}});
  const gpu::Array<char> scratch(std::vector<char>(decode_attention_scratch(1, 2, 128), 0));
  DecodeAttention a;
  a.query_heads = a.kv_heads = 2;
  a.head_dim = 128;
  a.query = query.data();
  a.output = output.data();
  a.state = state.data();
  a.context_rows = ContextRows::history;
  a.context = a.window = {keys.data(), values.data(), 2 * rows * 128, rows * 128};
  a.window_follows_history = true;
  a.scratch = scratch.data();
  decode_attention(a, {stream});
  const std::vector<bf16> got = output.get();
  uint16_t bits = 0x3F3F;
  bf16 value;
  std::memcpy(&value, &bits, 2);
  for (const bf16& x : got) CHECK_CLOSE(static_cast<float>(x), 2 * static_cast<float>(value), 0.01);
}

__global__ void fill(uint32_t* words, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u;
    x ^= x >> 15;
    words[i] = (x * 2246822519u & 0x807f807fu) | 0x3f003f00u;  // bfloat16, 0.5 ... 1 or negative
  }
}

struct Shape {
  const char* name;
  int query_heads, kv_heads, d, window = 256;
};

void bench(const Shape& m, int64_t history, int blocks, bool early) {
  const int64_t window = m.window, rows = history + window;
  const double bytes = 4.0 * rows * m.kv_heads * m.d;
  const int copies = static_cast<int>(std::min(64.0, std::ceil(200e6 / bytes)));  // not from L2
  const int64_t elements = rows * m.kv_heads * m.d;
  gpu::Array<bf16> keys(copies * elements), values(copies * elements);
  for (const gpu::Array<bf16>* to : {&keys, &values})
    fill<<<1024, 256>>>(reinterpret_cast<uint32_t*>(to->data()), to->size() / 2);
  check(cudaDeviceSynchronize(), "fill");
  const gpu::Array<float> query(gpu::normal<float>(m.query_heads * m.d, 2, 0.2f));
  const gpu::Array<bf16> output(query.size());
  const gpu::Array<SequenceState> state(std::vector<SequenceState>{{rows - 1, history, 0, 1}});
  const gpu::Array<char> scratch(
      std::vector<char>(decode_attention_scratch(1, m.query_heads, m.d), 0));
  DecodeAttention a;
  a.query_heads = m.query_heads;
  a.kv_heads = m.kv_heads;
  a.head_dim = m.d;
  a.query = query.data();
  a.output = output.data();
  a.state = state.data();
  a.context_rows = ContextRows::history;
  a.window_follows_history = true;
  a.most_rows = rows;
  a.most_window_rows = window;
  a.scratch = scratch.data();
  a.blocks = blocks;
  int next = 0;
  const auto work = [&](cudaStream_t to) {
    const int64_t at = next++ % copies * elements;
    a.context = a.window = {keys.data() + at, values.data() + at, elements, rows * m.d};
    decode_attention(a, {to, early});
  };
  const double us = gpu::microseconds(work, history > 500000 ? 8 : 3 * copies);
  gpu::report("decode attention " + std::string(m.name) + ", " + std::to_string(history) +
                  " rows + " + std::to_string(window) +
                  (blocks > 0 ? ", " + std::to_string(blocks) + " blocks" : "") +
                  (early ? ", early" : ""),
              us, bytes, 4.0 * rows * m.query_heads * m.d);
}

void bench_all() {
  std::printf("%d of %d multiprocessors are faster\n", multiprocessor_speeds().count,
              multiprocessors());
  const Shape shapes[] = {
      {"12 x d36", 12, 12, 36}, {"8 x d64", 8, 8, 64}, {"32/8 x d128", 32, 8, 128, 512}};
  for (const Shape& shape : shapes)
    for (bool early : {false, true})
      for (int64_t history : {256, 512, 1024, 16384, 131072, 1048576})
        bench(shape, history, 0, early);
  for (int64_t history : {1024, 131072, 1048576})
    for (int blocks : {66, 100, 108, 116, 124, 132}) bench(shapes[0], history, blocks, false);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::string(arguments[1]) == "bench") {
    bench_all();
    return 0;
  }
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  test_long<bf16>(1);
  test_long<f16>(2);
  // Enough for racecheck, which is slow.
  if (count > 1 && std::string(arguments[1]) == "long") return 0;
  test_sizes<bf16>();
  test_sizes<f16>();
  test<bf16>({36, 2, 2, ContextRows::history, true, {{1000001, 0, 200, 1}}}, 3);
  test<f16>({64, 4, 2, ContextRows::history, false, {{1000000, 0, 256, 1}}}, 4);
  test_offsets();
  std::puts("ok");
}
