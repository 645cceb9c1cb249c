// attention_step() against the two kernels that it replaces, and its speed beside theirs.
#include <cmath>

#include "cuda/step/attention_step.h"
#include "gpu.h"

using namespace tlinformer;
using namespace tlinformer::cuda;

namespace {

cudaStream_t stream;

struct Case {
  int hidden, d, query_heads, kv_heads;
  int compressed, window;  // rows; of the window without the token's own
  int most_context, most_window;
  bool behind = false;  // the kernel before advances the state
  int live = 1;
};

// Stands for the kernel before: lets the next one start, and is late with the state and x.
__global__ void late(SequenceState* state, SequenceState next, float* x, const float* from, int n) {
  let_next_start();
  wait_for_previous();
  const long long begin = clock64();
  while (clock64() - begin < 20000) continue;
  for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = from[i];
  if (threadIdx.x == 0) *state = next;
}

template <class T>
struct Layer {
  Case c;
  int64_t outputs, head_stride, context_stride;
  gpu::Array<T> weight, bias, norm_weight, norm_bias, context_keys, context_values;
  std::vector<T> window_keys, window_values;
  gpu::Array<float> x;
  gpu::Array<SequenceState> state;
  Rope rope;

  static std::vector<T> cached(const Case& c, int64_t stride, int rows, unsigned seed) {
    std::vector<T> values = gpu::normal<T>(static_cast<size_t>(stride * c.kv_heads), seed);
    for (int64_t i = 0; i < stride * c.kv_heads; ++i)
      if (i % stride >= int64_t{rows} * c.d) std::memset(&values[i], 0xFF, sizeof(T));
    return values;
  }
  Layer(const Case& from, unsigned seed)
      : c(from),
        outputs(int64_t{c.query_heads + 2 * c.kv_heads} * c.d),
        head_stride((int64_t{c.most_window} * c.d + 7) / 8 * 8),
        context_stride((int64_t{c.most_context} * c.d + 7) / 8 * 8),
        weight(gpu::normal<T>(outputs * c.hidden, seed, 2 / std::sqrt(float(c.hidden)))),
        bias(gpu::normal<T>(outputs, seed + 1)),
        norm_weight(gpu::normal<T>(c.hidden, seed + 2)),
        norm_bias(gpu::normal<T>(c.hidden, seed + 3)),
        context_keys(cached(c, context_stride, c.compressed, seed + 4)),
        context_values(cached(c, context_stride, c.compressed, seed + 5)),
        window_keys(cached(c, head_stride, c.window, seed + 6)),
        window_values(cached(c, head_stride, c.window, seed + 7)),
        x(gpu::normal<float>(c.hidden, seed + 8)),
        state(1) {
    Config config;
    config.hidden_size = c.query_heads * c.d;
    config.num_attention_heads = c.query_heads;
    rope = Rope::of(config);
  }
};

template <class T>
struct Run {
  const Layer<T>& layer;
  gpu::Array<T> keys, values, output;
  gpu::Array<float> query;
  gpu::Array<char> scratch;
  ProjectStep p;
  DecodeAttention a;

  explicit Run(const Layer<T>& from)
      : layer(from),
        keys(from.window_keys),
        values(from.window_values),
        output(from.c.query_heads * from.c.d),
        query(from.c.query_heads * from.c.d),
        scratch(decode_attention_scratch(1, from.c.query_heads, from.c.d)) {
    const Case& c = layer.c;
    check(cudaMemset(scratch.data(), 0, scratch.bytes()), "cudaMemset");
    p.dtype = a.dtype = gpu::kDType<T>;
    p.state = a.state = layer.state.data();
    p.x = layer.x.data();
    p.hidden_size = c.hidden;
    p.norm = {layer.norm_weight.data(), layer.norm_bias.data(), 1e-5f};
    p.weight = layer.weight.data();
    p.bias = layer.bias.data();
    p.query_heads = a.query_heads = c.query_heads;
    p.kv_heads = a.kv_heads = c.kv_heads;
    p.head_dim = a.head_dim = c.d;
    p.rope = layer.rope;
    p.query = query.data();
    p.new_rows = {keys.data(), values.data(), 0, layer.head_stride, false};
    a.query = query.data();
    a.output = output.data();
    a.context_rows = c.most_context > 0 ? ContextRows::compressed : ContextRows::none;
    a.context = {layer.context_keys.data(), layer.context_values.data(), 0, layer.context_stride};
    a.window = {keys.data(), values.data(), 0, layer.head_stride};
    a.most_rows = c.most_context + c.most_window;
    a.scratch = scratch.data();
  }
};

template <class T>
void check_close(const std::vector<T>& a, const std::vector<T>& b, double scale) {
  CHECK(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    const double x = static_cast<float>(a[i]), y = static_cast<float>(b[i]);
    if (std::memcmp(&a[i], &b[i], sizeof(T)) == 0) continue;  // NaN, untouched, among others
    CHECK(std::fabs(x - y) <= scale * gpu::kRounding<T> * (1 + std::fabs(y)));
  }
}

template <class T>
void test(const Case& c, unsigned seed) {
  Layer<T> layer(c, seed);
  const int64_t history = 12345;
  const SequenceState now{history + c.window, history, c.compressed, c.live};
  SequenceState before = now;
  if (c.behind) --before.last;
  const gpu::Array<float> x(layer.x.get());
  Run<T> one(layer), two(layer);
  CHECK(takes_attention_step(one.p, one.a));
  for (Run<T>* run : {&one, &two}) {
    layer.state.set({before});
    late<<<1, 256, 0, stream>>>(layer.state.data(), now, layer.x.data(), x.data(), c.hidden);
    if (run == &one) {
      attention_step(run->p, run->a, {stream, true});
    } else {
      project_step(run->p, {stream, true});
      decode_attention(run->a, {stream, true});
    }
    check(cudaStreamSynchronize(stream), "attention step");
  }
  if (!c.live) {
    const std::vector<T> output = one.output.get();
    CHECK(gpu::untouched(output.data(), output.size()));
  }
  // The two kernels round what the norm gives; one of them keeps it.
  check_close(one.keys.get(), two.keys.get(), 8);
  check_close(one.values.get(), two.values.get(), 8);
  check_close(one.output.get(), two.output.get(), 16);
}

template <class T>
void tests() {
  unsigned seed = 100;
  for (int d : {32, 36, 40, 48, 64, 80, 96, 128}) {
    test<T>({8 * d, d, 8, 8, 40, 23, 64, 64}, seed += 10);
    test<T>({4 * (d / 8) * 8, d, 8, 2, 0, 31, 0, 32, true}, seed += 10);
  }
  for (int window : {0, 1, 31, 32, 33, 200, 255}) {
    for (const bool behind : {false, true}) {
      test<T>({432, 36, 12, 12, 256, window, 256, 256, behind && window > 0}, seed += 10);
      test<T>({512, 64, 8, 8, 255 - window, window, 256, 256, behind && window > 0}, seed += 10);
    }
  }
  test<T>({1024, 64, 16, 16, 300, 500, 512, 512}, seed += 10);
  test<T>({1000, 40, 20, 2, 17, 3, 32, 8}, seed += 10);
  test<T>({432, 36, 12, 12, 100, 50, 256, 256, false, 0}, seed += 10);
}

void bench() {
  struct Size {
    const char* name;
    Case c;
  };
  const Size sizes[] = {
      {"D 432, 12 heads of 36, 256 + 256 rows", {432, 36, 12, 12, 256, 255, 256, 256}},
      {"D 512, 8 heads of 64, 256 + 256 rows", {512, 64, 8, 8, 256, 255, 256, 256}},
      {"D 512, 8 heads of 64, 512 + 512 rows", {512, 64, 8, 8, 512, 511, 512, 512}}};
  for (const Size& size : sizes) {
    const Case& c = size.c;
    Layer<bf16> layer(c, 1);
    layer.state.set({{12345 + c.window, 12345, c.compressed, 1}});
    Run<bf16> run(layer);
    const double rows = c.compressed + c.window, outputs = double(layer.outputs);
    const double bytes = 2 * (outputs * c.hidden + 2 * rows * c.kv_heads * c.d);
    const double flops = 2 * outputs * c.hidden + 4 * rows * c.query_heads * c.d;
    const std::string name = size.name;
    gpu::report("attention step, " + name,
                gpu::microseconds([&](cudaStream_t s) { attention_step(run.p, run.a, {s, true}); }),
                bytes, flops);
    gpu::report("its two kernels, " + name, gpu::microseconds([&](cudaStream_t s) {
                  project_step(run.p, {s, true});
                  decode_attention(run.a, {s, true});
                }),
                bytes, flops);
  }
}

}  // namespace

int main(int argc, char** argv) {
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  if (argc > 1 && std::string(argv[1]) == "bench") {
    bench();
    return 0;
  }
  tests<bf16>();
  tests<f16>();
  std::puts("ok");
}
