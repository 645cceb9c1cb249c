// Prefill attention against explicit attention in float64.
#include "cuda/attention/prefill_attention.h"
#include "heads.h"

using namespace tlinformer;
using namespace tlinformer::cuda;
using gpu::Tensor;

namespace {

struct Group {
  int64_t count = 0;
  bool causal = false;
  int64_t offset = 0;
};

struct Shape {
  int64_t batch, rows;
  int query_heads, kv_heads, d;
  Group groups[2];
  float scale = 0;  // 0: 1 / sqrt(d)
};

// Of one row and group: adds to `output` and to the sums of |terms|; returns the log-sum-exp.
double attend(const double* query, const double* keys, const double* values, int64_t count, int d,
              double scale, double* output, double* magnitude) {
  std::vector<double> weights(count);
  double top = -INFINITY, sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    double score = 0;
    for (int j = 0; j < d; ++j) score += query[j] * keys[i * d + j];
    weights[i] = score * scale;
    top = std::max(top, weights[i]);
  }
  for (double& w : weights) sum += w = std::exp(w - top);
  for (int64_t i = 0; i < count; ++i) {
    for (int j = 0; j < d; ++j) {
      output[j] += weights[i] / sum * values[i * d + j];
      magnitude[j] += std::fabs(weights[i] / sum * values[i * d + j]);
    }
  }
  return top + std::log(sum);
}

template <class T>
void test(const Shape& s, unsigned seed, bool scratch, bool log_sum_exp) {
  const bool interleaved = seed % 2 != 0;
  Tensor<T> query(s.batch, s.query_heads, s.rows, s.d, interleaved);
  Tensor<T> output(s.batch, s.query_heads, s.rows, s.d, !interleaved);
  const std::vector<double> q = query.fill(seed);
  std::vector<Tensor<T>> keys, values;
  std::vector<double> k[2], v[2];
  const int64_t places = s.batch * s.query_heads * s.rows;
  gpu::Array<float> exponents(2 * places);

  PrefillAttention a;
  a.dtype = std::is_same_v<T, bf16> ? DType::bfloat16 : DType::float16;
  a.batch = s.batch;
  a.rows = s.rows;
  a.query_heads = s.query_heads;
  a.kv_heads = s.kv_heads;
  a.head_dim = s.d;
  a.scale = s.scale != 0 ? s.scale : static_cast<float>(1 / std::sqrt(s.d));
  a.query = query.at;
  a.output = output.at;
  for (int g = 0; g < 2; ++g) {
    const Group& group = s.groups[g];
    keys.emplace_back(s.batch, s.kv_heads, group.count, s.d, seed % 3 == 0);
    values.emplace_back(s.batch, s.kv_heads, group.count, s.d, seed % 3 == 1);
    k[g] = keys[g].fill(seed + 10 + g);
    v[g] = values[g].fill(seed + 20 + g);
    a.groups[g].count = group.count;
    a.groups[g].causal = group.causal;
    a.groups[g].offset = group.offset;
    if (group.count == 0) continue;  // pointers stay null
    a.groups[g].keys = keys[g].at;
    a.groups[g].values = values[g].at;
  }
  a.log_sum_exp = log_sum_exp ? exponents.data() : nullptr;
  const int64_t bytes =
      scratch ? prefill_attention_scratch(s.batch, s.rows, s.query_heads, s.d) : 0;
  gpu::Array<float> memory(bytes / sizeof(float));
  a.scratch = bytes > 0 ? memory.data() : nullptr;
  a.scratch_bytes = bytes;
  prefill_attention(a, {nullptr, seed % 2 == 0});
  check(cudaDeviceSynchronize(), "prefill_attention");

  const std::vector<double> ours = output.get();
  const std::vector<float> our_exponents = exponents.get();
  const double epsilon = std::is_same_v<T, bf16> ? 0x1p-8 : 0x1p-11;
  for (int64_t place = 0; place < places; ++place) {
    const int64_t row = place % s.rows, head = place / s.rows % s.query_heads;
    const int64_t batch = place / s.rows / s.query_heads;
    const int64_t kv = batch * s.kv_heads + head / (s.query_heads / s.kv_heads);
    std::vector<double> exact(s.d), magnitude(s.d);
    for (int g = 0; g < 2; ++g) {
      const Group& group = s.groups[g];
      const int64_t count =
          group.causal ? std::min(group.count, row + group.offset + 1) : group.count;
      const double* from = k[g].data() + kv * group.count * s.d;
      const double exponent = attend(&q[place * s.d], from, v[g].data() + kv * group.count * s.d,
                                     count, s.d, a.scale, exact.data(), magnitude.data());
      if (!log_sum_exp) continue;
      const double x = our_exponents[g * places + place];
      if (count == 0) {
        CHECK(x == -INFINITY);
      } else {
        CHECK_CLOSE(x, exponent, epsilon / 2 + 1e-4 * std::max(1.0, std::fabs(exponent)));
      }
    }
    for (int j = 0; j < s.d; ++j) {
      // Half a unit each: of the weights, of their sum and of the output.
      const double rounding = epsilon / 2 * (2 * magnitude[j] + std::fabs(exact[j]));
      CHECK_CLOSE(ours[place * s.d + j], exact[j], rounding + 2e-5);
    }
  }
}

void test_both(const Shape& shape, unsigned seed) {
  test<bf16>(shape, seed, false, seed % 2 == 0);
  test<f16>(shape, seed + 1, false, seed % 2 != 0);
}

void test_shapes() {
  unsigned seed = 1;
  for (const int d : {32, 36, 40, 48, 64, 80, 96, 128}) {
    for (unsigned i = 0; i < 2; ++i, seed += 5) {
      test_both({1, 37, 2, 1, d, {{37, true}, {150}}}, seed);
      test_both({2, 150, 3, 3, d, {{129}, {}}}, seed + 1);
      test_both({1, 300, 1, 1, d, {{}, {310, true, 10}}}, seed + 2);
      test_both({1, 5, 2, 2, d, {{64, true, 59}, {1}}, -0.5f}, seed + 3);
    }
  }
  for (const int d : {36, 64}) {
    for (const int64_t rows : {1, 31, 32, 33, 127, 128, 129, 255, 256, 257}) {
      test_both({1, rows, 2, 2, d, {{rows, true}, {rows + 1}}}, seed++);
    }
    for (const int64_t count : {1, 31, 32, 33, 63, 64, 65, 191, 192, 193, 256, 257}) {
      test_both({1, 40, 2, 1, d, {{count}, {}}}, seed++);
      test_both({1, 40, 1, 1, d, {{count, true, 3}, {count, true, 1000}}}, seed++);
    }
    test_both({3, 20, 12, 4, d, {{20, true}, {77}}}, seed++);
    test_both({1, 40, 2, 2, d, {{}, {}}}, seed++);
    test_both({1, 40, 2, 2, d, {{100}, {}}, 20.0f}, seed++);         // close to a hard maximum
    test_both({1, 40, 2, 2, d, {{100, true}, {}}, 1e-30f}, seed++);  // a mean
  }
  test_both({1, 0, 2, 2, 36, {{5}, {}}}, seed++);
  test_both({0, 5, 2, 2, 36, {{5}, {}}}, seed++);
}

// Keys that stay in shared memory, and more rows than all warps take at once.
void test_resident() {
  unsigned seed = 500;
  for (const int d : {32, 36, 40, 48, 64, 80, 96, 128}) {
    const Shape shapes[] = {
        {1, 45000, 4, 2, d, {{33}, {}}},
        {2, 300, 2, 2, d, {{}, {256}}},
        {1, 100, 3, 1, d, {{190}, {}}},
    };
    for (const Shape& shape : shapes) {
      test<bf16>(shape, seed, false, false);
      test<f16>(shape, seed + 1, true, false);
      seed += 3;
    }
  }
}

void test_split() {
  unsigned seed = 1000;
  for (const int d : {36, 64, 128}) {
    const Shape shapes[] = {
        {1, 40, 3, 3, d, {{4001}, {}}},
        {1, 40, 2, 1, d, {{40, true}, {3000}}},
        {2, 33, 2, 2, d, {{2000, true, 1967}, {1500}}},
        {1, 260, 1, 1, d, {{1100, true, 0}, {1100}}},  // early rows see nothing of later parts
        {1, 1, 2, 2, d, {{}, {5000, true, 2500}}},
        {1, 30, 2, 2, d, {{900}, {64}}},  // not worth splitting
    };
    for (const Shape& shape : shapes) {
      test<bf16>(shape, seed, true, seed % 2 == 0);
      test<f16>(shape, seed + 1, true, seed % 2 != 0);
      seed += 3;
    }
  }
}

void test_errors() {
  gpu::Array<bf16> array(4096);
  PrefillAttention a;
  a.rows = a.query_heads = a.kv_heads = 1;
  a.head_dim = 40;
  a.query = a.output = a.groups[0].keys = a.groups[0].values = {array.data(), 40, 40, 40};
  a.groups[0].count = 1;
  const auto fails = [&](const char* part, const auto& change) {
    PrefillAttention changed = a;
    change(changed);
    check_throws<InvalidArgument>(part, [&] { prefill_attention(changed, {}); });
  };
  fails("heads of size 44", [](PrefillAttention& x) { x.head_dim = 44; });
  fails("cannot share 2", [](PrefillAttention& x) { x.kv_heads = 2; });
  fails("query must have rows aligned to 16", [](PrefillAttention& x) { x.query.row_stride = 44; });
  fails("values must have rows",
        [&](PrefillAttention& x) { x.groups[0].values.data = array.data() + 4; });
  fails("float16", [](PrefillAttention& x) { x.dtype = DType::float32; });
}

void bench(const char* what, int64_t rows, int heads, int d, Group window, Group context) {
  const int64_t count = std::max(window.count, context.count);
  const gpu::Array<bf16> query(rows * heads * d), output(rows * heads * d);
  const gpu::Array<bf16> keys(count * heads * d), values(count * heads * d);
  for (const auto* array : {&query, &keys, &values}) gpu::randomise(*array);
  const int64_t bytes = prefill_attention_scratch(1, rows, heads, d);
  const gpu::Array<char> scratch(bytes);
  PrefillAttention a;
  a.rows = rows;
  a.query_heads = a.kv_heads = heads;
  a.head_dim = d;
  a.scale = static_cast<float>(1 / std::sqrt(d));
  a.query = {query.data(), 0, d, int64_t{heads} * d};
  a.output = {output.data(), 0, d, int64_t{heads} * d};
  double pairs = 0, bytes_moved = 2.0 * rows * heads * d * 2;
  for (int g = 0; g < 2; ++g) {
    const Group& group = g == 0 ? window : context;
    a.groups[g] = {{keys.data(), 0, count * d, d}, {values.data(), 0, count * d, d}};
    a.groups[g].count = group.count;
    a.groups[g].causal = group.causal;
    pairs += static_cast<double>(rows) * group.count / (group.causal ? 2 : 1);
    bytes_moved += 2.0 * group.count * heads * d * 2;
  }
  a.scratch = bytes > 0 ? scratch.data() : nullptr;
  a.scratch_bytes = bytes;
  const double us = gpu::microseconds([&](cudaStream_t stream) { prefill_attention(a, {stream}); },
                                      count > 500000 ? 3 : 20);
  char name[100];
  std::snprintf(name, sizeof(name), "%s: %ld rows, %ld + %ld keys, %d heads of %d", what,
                static_cast<long>(rows), static_cast<long>(window.count),
                static_cast<long>(context.count), heads, d);
  gpu::report(name, us, bytes_moved, 4 * d * heads * pairs);
}

void bench() {
  const struct {
    int heads, d;
  } models[] = {{12, 36}, {8, 64}, {8, 128}};
  for (const auto& m : models) {
    for (const int64_t keys : {16384, 131072, 1048576}) {
      bench("focused", 256, m.heads, m.d, {}, {keys});
    }
    for (const int64_t rows : {4096, 8192, 16384}) {
      bench("restore", rows, m.heads, m.d, {}, {256});
    }
    bench("hidden", 256, m.heads, m.d, {}, {256});
    bench("window", 256, m.heads, m.d, {256, true}, {256});
    bench("window", 256, m.heads, m.d, {256, true}, {131072});
    bench("causal", 8192, m.heads, m.d, {8192, true}, {});
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::string(arguments[1]) == "bench") {
    bench();
    return 0;
  }
  test_shapes();
  test_resident();
  test_split();
  test_errors();
  std::puts("ok");
}
