// The cluster step against a float64 reference of each segment; `bench` prints its times.
#include <cmath>
#include <memory>

#include "cuda/cluster/cluster_step.h"
#include "gpu.h"

using namespace tlinformer;
using namespace tlinformer::cuda;

namespace {

template <class T>
DType dtype_of();
template <>
DType dtype_of<bf16>() {
  return DType::bfloat16;
}
template <>
DType dtype_of<f16>() {
  return DType::float16;
}

using Doubles = std::vector<double>;

template <class T>
double round_to(double x) {
  return static_cast<double>(static_cast<float>(T(static_cast<float>(x))));
}

template <class T>
T nan_of() {
  return T(std::nanf(""));
}

// An array of the device, and what it holds.
template <class T>
struct Both {
  std::vector<T> host;
  gpu::Array<T> device;
  explicit Both(std::vector<T> values) : host(std::move(values)), device(host) {}
  double operator[](size_t i) const { return static_cast<double>(static_cast<float>(host[i])); }
};

template <class T>
std::unique_ptr<Both<T>> random(size_t count, unsigned seed, float scale, float offset = 0) {
  std::vector<T> values = gpu::normal<T>(count, seed, scale);
  for (T& x : values) x = T(static_cast<float>(x) + offset);
  return std::make_unique<Both<T>>(std::move(values));
}

// Keys or values of a layer: rows of each head, then NaN up to the head's stride.
template <class T>
struct Rows {
  int64_t stride = 0;
  std::unique_ptr<Both<T>> values;
  Rows(int64_t heads, int64_t d, int64_t rows, int64_t capacity, unsigned seed) {
    stride = (capacity * d + 7) / 8 * 8;
    std::vector<T> all = gpu::normal<T>(static_cast<size_t>(heads * stride), seed);
    for (int64_t i = 0; i < heads * stride; ++i) {
      if (i % stride >= rows * d) all[static_cast<size_t>(i)] = nan_of<T>();
    }
    values = std::make_unique<Both<T>>(std::move(all));
  }
};

struct Sizes {
  int64_t width, heads, kv_heads, hidden, blocks, depth;
  int64_t history, window;       // tokens, the window's with the new one
  int64_t compressed, capacity;  // rows; capacity of window and context
};

template <class T>
struct Layer {
  std::unique_ptr<Both<T>> norm1, bias1, qkv, qkv_bias, out, out_bias, norm2, bias2, gate, up, down;
  Rows<T> window_keys, window_values, context_keys, context_values;

  Layer(const Sizes& s, bool follows, unsigned seed)
      : window_keys(s.kv_heads, s.width / s.heads, cached(s, follows), capacity(s, follows),
                    seed + 20),
        window_values(s.kv_heads, s.width / s.heads, cached(s, follows), capacity(s, follows),
                      seed + 21),
        context_keys(s.kv_heads, s.width / s.heads, s.compressed, s.capacity, seed + 22),
        context_values(s.kv_heads, s.width / s.heads, s.compressed, s.capacity, seed + 23) {
    const size_t width = static_cast<size_t>(s.width), hidden = static_cast<size_t>(s.hidden);
    const size_t lines = static_cast<size_t>((s.heads + 2 * s.kv_heads) * (s.width / s.heads));
    const float in = 1.0f / std::sqrt(static_cast<float>(width));
    norm1 = random<T>(width, seed, 0.1f, 1.0f);
    bias1 = random<T>(width, seed + 1, 0.1f);
    qkv = random<T>(lines * width, seed + 2, 1.5f * in);
    qkv_bias = random<T>(lines, seed + 3, 0.2f);
    out = random<T>(width * width, seed + 4, in);
    out_bias = random<T>(width, seed + 5, 0.2f);
    norm2 = random<T>(width, seed + 6, 0.1f, 1.0f);
    bias2 = random<T>(width, seed + 7, 0.1f);
    gate = random<T>(hidden * width, seed + 8, 1.5f * in);
    up = random<T>(hidden * width, seed + 9, in);
    down = random<T>(width * hidden, seed + 10, 1.0f / std::sqrt(static_cast<float>(hidden)));
  }

  static int64_t cached(const Sizes& s, bool follows) {
    return (follows ? s.history : 0) + s.window - 1;
  }
  static int64_t capacity(const Sizes& s, bool follows) {
    return (follows ? s.history : 0) + s.capacity;
  }

  ClusterLayer view(bool first, bool follows) const {
    ClusterLayer layer;
    layer.weights = {norm1->device.data(),    bias1->device.data(), qkv->device.data(),
                     qkv_bias->device.data(), out->device.data(),   out_bias->device.data(),
                     norm2->device.data(),    bias2->device.data(), gate->device.data(),
                     up->device.data(),       down->device.data()};
    layer.window = {window_keys.values->device.data(), window_values.values->device.data(), 0,
                    window_keys.stride, follows};
    if (!first) {
      layer.context = {context_keys.values->device.data(), context_values.values->device.data(), 0,
                       context_keys.stride};
    }
    return layer;
  }
};

template <class T>
struct Model {
  Sizes sizes;
  Config config;
  std::vector<std::unique_ptr<Layer<T>>> layers;
  gpu::Array<char> packed;
  gpu::Array<SequenceState> state;
  Both<float> x, query;
  Both<T> attended;
  std::unique_ptr<ClusterStep> step;

  static Config config_of(const Sizes& s) {
    Config config;
    config.vocab_size = 8;
    config.hidden_size = s.width;
    config.num_attention_heads = s.heads;
    config.num_key_value_heads = s.kv_heads;
    config.intermediate_size = s.hidden;
    config.num_blocks = s.blocks;
    config.block_depth = s.depth;
    return config;
  }

  Model(const Sizes& s, unsigned seed)
      : sizes(s),
        config(config_of(s)),
        packed(static_cast<size_t>(ClusterStep::packed_bytes(config))),
        state(1),
        x(gpu::normal<float>(static_cast<size_t>(s.width), seed + 1)),
        query(gpu::normal<float>(static_cast<size_t>(s.width), seed + 2)),
        attended(gpu::normal<T>(static_cast<size_t>(s.width), seed + 3)) {
    std::vector<ClusterLayer> views;
    for (int64_t i = 0; i < config.num_layers(); ++i) {
      const bool first = i % s.depth == 0;
      layers.push_back(std::make_unique<Layer<T>>(s, i == 0, seed + 100 * unsigned(i + 1)));
      views.push_back(layers.back()->view(first, i == 0));
    }
    CHECK(ClusterStep::supports(config, dtype_of<T>(), s.capacity, s.capacity));
    ClusterBuffers buffers;
    buffers.state = state.data();
    buffers.x = x.device.data();
    buffers.query = query.device.data();
    buffers.attended = attended.device.data();
    buffers.packed = packed.data();
    step = std::make_unique<ClusterStep>(config, dtype_of<T>(), views, buffers, s.capacity,
                                         s.capacity, nullptr);
    live(1);
  }

  void live(int32_t value) {
    SequenceState now;
    now.last = sizes.history + sizes.window - 1;
    now.history = sizes.history;
    now.compressed = static_cast<int32_t>(sizes.compressed);
    now.live = value;
    state.set({now});
  }
};

template <class T>
Doubles product(const Doubles& input, const Both<T>& matrix, const Both<T>* bias) {
  const size_t outputs = matrix.host.size() / input.size();
  Doubles output(outputs);
  for (size_t i = 0; i < outputs; ++i) {
    double sum = bias == nullptr ? 0 : (*bias)[i];
    for (size_t j = 0; j < input.size(); ++j) sum += matrix[i * input.size() + j] * input[j];
    output[i] = sum;
  }
  return output;
}

template <class T>
Doubles normed(const Doubles& x, const Both<T>& weight, const Both<T>& bias) {
  double mean = 0, variance = 0;
  for (double v : x) mean += v / static_cast<double>(x.size());
  for (double v : x) variance += (v - mean) * (v - mean) / static_cast<double>(x.size());
  Doubles y;
  for (size_t i = 0; i < x.size(); ++i) {
    y.push_back(round_to<T>((x[i] - mean) / std::sqrt(variance + 1e-5) * weight[i] + bias[i]));
  }
  return y;
}

struct Projected {
  Doubles query, keys, values;  // query times log2(e) / sqrt(d); keys, values rounded
};

template <class T>
Projected project(const Sizes& s, const Layer<T>& layer, const Doubles& x) {
  const Doubles lines =
      product(normed(x, *layer.norm1, *layer.bias1), *layer.qkv, layer.qkv_bias.get());
  const size_t d = static_cast<size_t>(s.width / s.heads), heads = static_cast<size_t>(s.heads);
  const size_t kv_heads = static_cast<size_t>(s.kv_heads);
  Projected p;
  for (size_t line = 0; line < lines.size(); line += 2) {
    double a = lines[line], b = lines[line + 1];
    if (line < (heads + kv_heads) * d) {
      const double i = static_cast<double>(line % d);
      const double angle = static_cast<double>(s.history + s.window - 1) *
                           std::pow(10000.0, -i / static_cast<double>(d));
      const double c = std::cos(angle), z = std::sin(angle), turned = a * z + b * c;
      a = a * c - b * z;
      b = turned;
    }
    const double scale = 1.0 / std::log(2.0) / std::sqrt(static_cast<double>(d));
    Doubles& to = line < heads * d ? p.query : line < (heads + kv_heads) * d ? p.keys : p.values;
    to.push_back(line < heads * d ? a * scale : round_to<T>(a));
    to.push_back(line < heads * d ? b * scale : round_to<T>(b));
  }
  return p;
}

// One head's softmax over cached rows and, if given, the new one.
template <class T>
Doubles attend(const double* query, size_t d, const Rows<T>& keys, const Rows<T>& values,
               size_t head, size_t rows, const double* new_key, const double* new_value) {
  const size_t base = head * static_cast<size_t>(keys.stride);
  Doubles output(d), weights;
  double sum = 0;
  for (size_t row = 0; row < rows + (new_key != nullptr); ++row) {
    double score = 0;
    for (size_t i = 0; i < d; ++i) {
      score += query[i] * (row < rows ? (*keys.values)[base + row * d + i] : new_key[i]);
    }
    weights.push_back(std::exp2(score));
    sum += weights.back();
  }
  for (size_t row = 0; row < weights.size(); ++row) {
    for (size_t i = 0; i < d; ++i) {
      output[i] +=
          weights[row] / sum * (row < rows ? (*values.values)[base + row * d + i] : new_value[i]);
    }
  }
  return output;
}

template <class T>
void finish(const Layer<T>& layer, const Doubles& attended, Doubles& x) {
  const Doubles added = product(attended, *layer.out, layer.out_bias.get());
  for (size_t i = 0; i < x.size(); ++i) x[i] += added[i];
  const Doubles y = normed(x, *layer.norm2, *layer.bias2);
  Doubles hidden = product<T>(y, *layer.gate, nullptr);
  const Doubles up = product<T>(y, *layer.up, nullptr);
  for (size_t i = 0; i < hidden.size(); ++i) {
    hidden[i] = round_to<T>(hidden[i] / (1 + std::exp(-hidden[i])) * up[i]);
  }
  const Doubles down = product<T>(hidden, *layer.down, nullptr);
  for (size_t i = 0; i < x.size(); ++i) x[i] += down[i];
}

// The new row is there, to rounding; every other byte is as it was.
template <class T>
void check_rows(const Rows<T>& cache, size_t d, size_t slot, const Doubles* expected,
                double tolerance) {
  const std::vector<T> now = cache.values->device.get();
  const size_t stride = static_cast<size_t>(cache.stride);
  for (size_t i = 0; i < now.size(); ++i) {
    const size_t place = i % stride;
    if (expected != nullptr && place / d == slot && place < (slot + 1) * d) {
      const double wanted = (*expected)[i / stride * d + place % d];
      const double epsilon = dtype_of<T>() == DType::bfloat16 ? 1.0 / 128 : 1.0 / 1024;
      CHECK_CLOSE(static_cast<double>(static_cast<float>(now[i])), wanted,
                  std::fabs(wanted) * epsilon + tolerance);
    } else {
      CHECK(std::memcmp(&now[i], &cache.values->host[i], sizeof(T)) == 0);
    }
  }
}

void check_close(const std::vector<float>& actual, const Doubles& expected, double tolerance,
                 double relative) {
  CHECK(actual.size() == expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    CHECK_CLOSE(static_cast<double>(actual[i]), expected[i],
                tolerance + relative * std::fabs(expected[i]));
  }
}

template <class T>
void test(const Sizes& s, unsigned seed) {
  Model<T> model(s, seed);
  const size_t d = static_cast<size_t>(s.width / s.heads);
  const size_t cached = static_cast<size_t>(s.window - 1);
  const size_t group = static_cast<size_t>(s.heads / s.kv_heads);
  // Where float32 and float64 round an input of a product to different neighbours, layers add up.
  const double tolerance = dtype_of<T>() == DType::bfloat16 ? 2e-2 : 2.5e-3;
  const double relative = dtype_of<T>() == DType::bfloat16 ? 1.0 / 256 : 1.0 / 2048;
  for (int segment = 0; segment <= s.blocks; ++segment) {
    model.x.device.set(model.x.host);
    model.query.device.set(model.query.host);
    model.live(0);
    model.step->run(segment, {});
    CHECK(model.x.device.get() == model.x.host);
    CHECK(model.query.device.get() == model.query.host);
    for (const auto& layer : model.layers) {
      check_rows(layer->window_keys, d, 0, nullptr, 0);
      check_rows(layer->window_values, d, 0, nullptr, 0);
    }
    model.live(segment % 2 == 0 ? 2 : 1);
    model.step->run(segment, {});
    check(cudaDeviceSynchronize(), "segment");

    Doubles x = gpu::doubles(model.x.host);
    Doubles query = gpu::doubles(model.query.host);
    size_t layer = static_cast<size_t>(std::max(0, segment - 1) * s.depth);
    std::vector<Projected> projected(model.layers.size());
    if (segment > 0) {
      finish(*model.layers[layer], gpu::doubles(model.attended.host), x);
      const size_t end = ++layer + static_cast<size_t>(s.depth - 1);
      for (; layer < end; ++layer) {
        const Layer<T>& l = *model.layers[layer];
        Projected& p = projected[layer] = project(s, l, x);
        Doubles attended;
        for (size_t head = 0; head < static_cast<size_t>(s.heads); ++head) {
          const size_t kv = head / group;
          const Doubles a = attend(&p.query[head * d], d, l.window_keys, l.window_values, kv,
                                   cached, &p.keys[kv * d], &p.values[kv * d]);
          Doubles b(d);
          if (s.compressed > 0) {
            b = attend(&p.query[head * d], d, l.context_keys, l.context_values, kv,
                       static_cast<size_t>(s.compressed), nullptr, nullptr);
          }
          for (size_t i = 0; i < d; ++i) attended.push_back(round_to<T>(a[i] + b[i]));
        }
        finish(l, attended, x);
      }
    }
    if (layer < model.layers.size()) {
      projected[layer] = project(s, *model.layers[layer], x);
      query = projected[layer].query;
    }
    check_close(model.x.device.get(), x, tolerance, relative);
    check_close(model.query.device.get(), query, tolerance, relative);
    for (size_t i = 0; i < model.layers.size(); ++i) {
      const Layer<T>& l = *model.layers[i];
      const size_t slot = cached + (i == 0 ? static_cast<size_t>(s.history) : 0);
      const bool done = !projected[i].keys.empty();
      check_rows(l.window_keys, d, slot, done ? &projected[i].keys : nullptr, tolerance);
      check_rows(l.window_values, d, slot, done ? &projected[i].values : nullptr, tolerance);
      l.window_keys.values->device.set(l.window_keys.values->host);
      l.window_values.values->device.set(l.window_values.values->host);
    }
  }
}

template <class T>
void bench(const char* name, const Sizes& s) {
  Model<T> model(s, 1);
  const double d = static_cast<double>(s.width / s.heads);
  const double width = static_cast<double>(s.width), hidden = static_cast<double>(s.hidden);
  const double lines = static_cast<double>(s.heads + 2 * s.kv_heads) * d;
  const double layer = 2 * width * (lines + width + 3 * hidden);
  const double rows = static_cast<double>(s.kv_heads * (s.compressed + s.window)) * d * 4;
  const double layers = static_cast<double>(s.blocks * s.depth);
  for (bool early : {false, true}) {
    const auto run = [&](int begin, int end) {
      return gpu::microseconds([&](cudaStream_t stream) {
        for (int i = begin; i < end; ++i) model.step->run(i, {stream, early});
      });
    };
    const std::string kind = std::string(name) + (early ? ", early" : "");
    for (int i = 0; i <= s.blocks; ++i) {
      const bool last = i == s.blocks;
      const double depth = static_cast<double>(s.depth);
      const double bytes =
          i == 0 ? 2 * width * lines
                 : depth * layer - (last ? 2 * width * lines : 0) + (depth - 1) * rows;
      gpu::report(kind + ", segment " + std::to_string(i), run(i, i + 1), bytes, bytes);
    }
    const double bytes = layers * layer + static_cast<double>(s.blocks * (s.depth - 1)) * rows;
    const double us = run(0, static_cast<int>(s.blocks) + 1);
    gpu::report(kind + ", all segments", us, bytes, bytes);
    std::printf("  %.2f us a layer\n", us / layers);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const Sizes paper{432, 12, 12, 1280, 2, 4, 2560, 256, 256, 256};
  const Sizes wide{512, 8, 8, 1536, 2, 4, 2560, 256, 256, 256};
  if (!ClusterStep::supports(Model<bf16>::config_of(paper), DType::bfloat16, 256, 256)) {
    std::puts("skipped: no cluster of 16 blocks here");
    return 77;
  }
  if (count > 1 && std::string(arguments[1]) == "bench") {
    bench<bf16>("41M", paper);
    Sizes fresh = paper;
    fresh.window = 1;
    bench<bf16>("41M, window of 1", fresh);
    bench<bf16>("D 512", wide);
    return 0;
  }
  CHECK(!ClusterStep::supports(Model<bf16>::config_of(paper), DType::float32, 256, 256));
  unsigned seed = 1;
  test<bf16>(paper, seed++);
  for (int64_t window : {1, 2, 32, 33, 255}) {
    Sizes sizes = paper;
    sizes.window = window;
    sizes.depth = 2;
    test<bf16>(sizes, seed++);
  }
  Sizes empty = paper;
  empty.history = empty.compressed = 0;
  empty.window = 100;
  empty.depth = 2;
  test<f16>(empty, seed++);
  test<bf16>(wide, seed++);
  test<f16>({512, 8, 2, 1536, 1, 3, 768, 200, 131, 256}, seed++);
  const Sizes small{72, 2, 2, 40, 2, 3, 12, 3, 5, 5};
  test<bf16>(small, seed++);
  test<f16>(small, seed++);
  test<bf16>({72, 2, 1, 40, 3, 2, 12, 4, 5, 5}, seed++);
  test<f16>({720, 20, 20, 200, 2, 2, 1000, 77, 99, 100}, seed++);       // several heads of a block
  test<bf16>({1280, 20, 20, 72, 1, 2, 5000, 300, 1000, 1000}, seed++);  // several chunks
  test<bf16>({640, 20, 4, 96, 1, 2, 64, 40, 64, 64}, seed++);
  for (int64_t d : {40, 48, 80, 96, 128}) {
    test<bf16>({4 * d, 4, 2, 88, 1, 2, 512, 130, 200, 256}, seed++);
  }
  test<bf16>({256, 8, 4, 88, 1, 2, 512, 130, 200, 256}, seed++);
  std::puts("ok");
  return 0;
}
