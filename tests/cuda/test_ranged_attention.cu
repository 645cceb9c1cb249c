// Attention of training, forward and backward, against explicit attention in float64.
#include "cuda/attention/ranged_attention.h"
#include "heads.h"

using namespace tlinformer;
using namespace tlinformer::cuda;
using gpu::Tensor;

namespace {

struct Shape {
  int64_t batch;
  int query_heads, kv_heads, d;
  int64_t query_rows, output_rows, key_rows[2];
  bool one_tensor;  // of keys, for window and context
  std::vector<Segment> segments;
  float dropout = 0;
  float scale = 0;  // 0: 1 / sqrt(d)
};

// What dropout_bits.cuh says, once more.
uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

struct Bits {
  uint32_t rows, keys;
  Bits(uint64_t seed, int64_t head) {
    rows = mix(static_cast<uint32_t>(seed) ^
               mix(static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(head)));
    keys = mix(rows ^ 0x9e3779b9u);
  }
  uint32_t at(int row, int group, int key) const {
    const uint32_t of_row = mix(rows ^ static_cast<uint32_t>(2 * row + group) * 0x9e3779b1u) | 1;
    return of_row * mix(keys ^ static_cast<uint32_t>(key) * 0x9e3779b1u);
  }
};

// Values as (batch, heads, rows, d), and beside each the sum of magnitudes that rounding scales.
struct Exact {
  std::vector<double> value, magnitude;
  explicit Exact(size_t n = 0) : value(n), magnitude(n) {}
  void add(size_t i, double x, double of) {
    value[i] += x;
    magnitude[i] += of;
  }
};

double dot(const double* a, const double* b, int d) {
  double sum = 0;
  for (int j = 0; j < d; ++j) sum += a[j] * b[j];
  return sum;
}

struct Reference {
  Exact output, grad_query, grad_keys[2], grad_values[2];
};

// q, do: (batch, Hq, rows, d); k, v: (batch, Hkv, rows, d) of each group.
Reference explain(const Shape& s, double scale, uint64_t seed, const std::vector<double>& q,
                  const std::vector<double>* k, const std::vector<double>* v,
                  const std::vector<double>& slope) {
  const int d = s.d;
  Reference ref;
  ref.output = Exact(slope.size());
  ref.grad_query = Exact(q.size());
  for (int g = 0; g < 2; ++g) {
    ref.grad_keys[g] = Exact(k[g].size());
    ref.grad_values[g] = Exact(v[g].size());
  }
  const uint32_t threshold = static_cast<uint32_t>(s.dropout * 4294967296.0);
  const double kept_scale = 1 / (1 - threshold / 4294967296.0);
  for (int64_t line = 0; line < s.batch * s.query_heads; ++line) {
    const int64_t batch = line / s.query_heads, head = line % s.query_heads;
    const int64_t kv = batch * s.kv_heads + head / (s.query_heads / s.kv_heads);
    const Bits bits(seed, line);
    for (const Segment& segment : s.segments) {
      for (int i = 0; i < segment.rows; ++i) {
        const size_t qi = (line * s.query_rows + segment.query + i) * d;
        const size_t oi = (line * s.output_rows + segment.output + i) * d;
        // The kernel's delta of a group comes from the outputs of both.
        double rounding_of_delta = 0;
        for (int pass = 0; pass < 2; ++pass) {
          for (int g = 0; g < 2; ++g) {
            const int first = g == 0 ? segment.window : segment.context;
            const int count = g == 1 ? segment.context_rows : first < 0 ? 0 : i + 1;
            if (count == 0) continue;
            std::vector<double> p(count), slopes(count), kept(count);
            double top = -INFINITY, sum = 0;
            const auto key = [&](int j) { return (kv * s.key_rows[g] + first + j) * d; };
            for (int j = 0; j < count; ++j) {
              p[j] = scale * dot(&q[qi], &k[g][key(j)], d);
              top = std::max(top, p[j]);
            }
            for (double& x : p) sum += x = std::exp(x - top);
            double delta = 0;
            std::vector<double> output(d);
            for (int j = 0; j < count; ++j) {
              p[j] /= sum;
              kept[j] = threshold == 0 || bits.at(segment.output + i, g, first + j) >= threshold
                            ? kept_scale
                            : 0;
              slopes[j] = kept[j] * dot(&slope[oi], &v[g][key(j)], d);
              delta += p[j] * slopes[j];
              for (int c = 0; c < d; ++c) output[c] += p[j] * kept[j] * v[g][key(j) + c];
            }
            if (pass == 0) {
              for (int c = 0; c < d; ++c) {
                rounding_of_delta += std::fabs(slope[oi + c] * output[c]);
              }
              for (int j = 0; j < count; ++j)
                for (int c = 0; c < d; ++c) {
                  const double x = p[j] * kept[j] * v[g][key(j) + c];
                  ref.output.add(oi + c, x, std::fabs(x));
                }
              continue;
            }
            for (int j = 0; j < count; ++j) {
              const double x = p[j] * (slopes[j] - delta) * scale;
              const double of = std::fabs(x) + 2 * p[j] * rounding_of_delta * std::fabs(scale);
              for (int c = 0; c < d; ++c) {
                const double y = k[g][key(j) + c], z = q[qi + c];
                ref.grad_query.add(qi + c, x * y, of * std::fabs(y));
                ref.grad_keys[g].add(key(j) + c, x * z, of * std::fabs(z));
                const double w = p[j] * kept[j] * slope[oi + c];
                ref.grad_values[g].add(key(j) + c, w, std::fabs(w));
              }
            }
          }
        }
      }
    }
  }
  return ref;
}

void check_near(const char* what, const std::vector<double>& ours, const Exact& exact,
                double epsilon) {
  CHECK(ours.size() == exact.value.size());
  for (size_t i = 0; i < ours.size(); ++i) {
    const double bound = epsilon * (exact.magnitude[i] + std::fabs(exact.value[i])) + 1e-4;
    if (!(std::fabs(ours[i] - exact.value[i]) <= bound)) std::printf("%s %zu: ", what, i);
    CHECK_CLOSE(ours[i], exact.value[i], bound);
  }
}

template <class T>
void test(const Shape& s, unsigned seed) {
  const bool interleaved = seed % 2 != 0;
  const auto tensor = [&](int64_t heads, int64_t rows, bool other = false) {
    return Tensor<T>(s.batch, heads, rows, s.d, interleaved != other);
  };
  Tensor<T> query = tensor(s.query_heads, s.query_rows),
            output = tensor(s.query_heads, s.output_rows, true);
  Tensor<T> terms = tensor(2 * s.query_heads, s.output_rows),
            slope = tensor(s.query_heads, s.output_rows);
  Tensor<T> grad_query = tensor(s.query_heads, s.query_rows, true);
  std::vector<Tensor<T>> keys, values, grad_keys, grad_values;
  std::vector<double> k[2], v[2];
  for (int g = 0; g < 2; ++g) {
    if (g == 1 && s.one_tensor) {
      k[1] = k[0];
      v[1] = v[0];
      break;
    }
    for (auto* list : {&keys, &values, &grad_keys, &grad_values}) {
      list->push_back(tensor(s.kv_heads, s.key_rows[g], list == &values));
    }
    k[g] = keys[g].fill(seed + 10 + g);
    v[g] = values[g].fill(seed + 20 + g);
  }
  const std::vector<double> q = query.fill(seed), arriving = slope.fill(seed + 1);
  const std::vector<int64_t> random_seed{static_cast<int64_t>(0x9876543210abcdefull + seed)};
  const gpu::Array<int64_t> device_seed(random_seed);
  const size_t lines = 2 * s.batch * s.query_heads * s.output_rows;
  gpu::Array<float> log_sum_exp(lines), delta(lines);

  RangedAttention a;
  a.dtype = gpu::kDType<T>;
  a.batch = s.batch;
  a.query_rows = s.query_rows;
  a.output_rows = s.output_rows;
  a.query_heads = s.query_heads;
  a.kv_heads = s.kv_heads;
  a.head_dim = s.d;
  a.scale = s.scale != 0 ? s.scale : static_cast<float>(1 / std::sqrt(s.d));
  a.query = query.at;
  a.output = output.at;
  a.terms = terms.at;
  a.segments = s.segments.data();
  a.segment_count = static_cast<int>(s.segments.size());
  a.log_sum_exp = log_sum_exp.data();
  a.dropout = s.dropout;
  a.seed = s.dropout > 0 ? device_seed.data() : nullptr;
  RangedGradient gradient;
  gradient.output = slope.at;
  gradient.query = grad_query.at;
  gradient.delta = delta.data();
  for (int g = 0; g < 2; ++g) {
    const int i = s.one_tensor ? 0 : g;
    a.key_rows[g] = s.key_rows[i];
    a.keys[g] = keys[i].at;
    a.values[g] = values[i].at;
    gradient.keys[g] = grad_keys[i].at;
    gradient.values[g] = grad_values[i].at;
  }
  ranged_attention(a, {});
  ranged_attention_gradient(a, gradient, {});
  check(cudaDeviceSynchronize(), "ranged_attention");

  Reference ref = explain(s, a.scale, static_cast<uint64_t>(random_seed[0]), q, k, v, arriving);
  const double epsilon = std::is_same_v<T, bf16> ? 0x1p-8 : 0x1p-11;
  check_near("output", output.get(), ref.output, epsilon);
  check_near("grad_query", grad_query.get(), ref.grad_query, epsilon);
  for (int g = 0; g < (s.one_tensor ? 1 : 2); ++g) {
    if (s.one_tensor) {
      for (size_t i = 0; i < ref.grad_keys[0].value.size(); ++i) {
        ref.grad_keys[0].add(i, ref.grad_keys[1].value[i], ref.grad_keys[1].magnitude[i]);
        ref.grad_values[0].add(i, ref.grad_values[1].value[i], ref.grad_values[1].magnitude[i]);
      }
    }
    check_near("grad_keys", grad_keys[g].get(), ref.grad_keys[g], epsilon);
    check_near("grad_values", grad_values[g].get(), ref.grad_values[g], epsilon);
  }
}

void test_both(const Shape& shape, unsigned seed) {
  test<bf16>(shape, seed);
  test<f16>(shape, seed + 1);
}

// One window and its context, in tensors of their own.
Shape window(int64_t batch, int query_heads, int kv_heads, int d, int rows, int context) {
  return {batch,
          query_heads,
          kv_heads,
          d,
          rows,
          rows,
          {rows, context},
          false,
          {{0, rows, 0, 0, 0, context}}};
}

// Three windows of a sequence with overlapping histories, and the histories' last rows that read
// them: as in a compress layer.
Shape sequence(int64_t batch, int query_heads, int kv_heads, int d, int w, int z, float dropout) {
  Shape s{batch, query_heads, kv_heads, d, 3 * w + 5, 0, {3 * w + 5, 3 * w + 5}, true, {}, dropout};
  int output = 0;
  for (int i = 0; i < 3; ++i, output += w)
    s.segments.push_back({i * w, w, output, i * w, 0, i * w});
  for (int i = 1; i < 3; ++i, output += z) {
    s.segments.push_back({i * w - z, z, output, -1, 0, i * w});
  }
  s.output_rows = output;
  return s;
}

void test_shapes() {
  unsigned seed = 1;
  for (const int d : {32, 36, 40, 48, 64, 80, 96, 128}) {
    test_both(window(1, 2, 1, d, 37, 150), seed++);
    test_both(window(2, 3, 3, d, 150, 0), seed++);
    test_both(sequence(1, 2, 2, d, 70, 33, 0), seed++);
    test_both(sequence(1, 2, 1, d, 40, 40, 0.2f), seed++);
  }
  for (const int d : {36, 64}) {
    for (const int rows : {1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200}) {
      test_both(window(1, 1, 1, d, rows, rows % 3 == 0 ? 1 : rows + 3), seed++);
    }
    test_both(sequence(2, 4, 2, d, 130, 70, 0.5f), seed++);
    Shape shape = window(1, 2, 2, d, 90, 100);
    for (const float scale : {-0.5f, 1e-30f, 4.0f}) {
      shape.scale = scale;
      test_both(shape, seed++);
    }
    // Rows and keys that nothing names get the gradient 0.
    test_both({1, 2, 2, d, 300, 20, {300, 200}, false, {{140, 20, 0, -1, 70, 30}}}, seed++);
    test_both({1, 2, 2, d, 50, 0, {50, 50}, true, {}}, seed++);
  }
}

void test_errors() {
  gpu::Array<bf16> array(4096);
  const HeadTensor rows{array.data(), 400, 40, 40};
  Segment segment{0, 4, 0, 0, 0, 6};
  RangedAttention a;
  a.query_heads = a.kv_heads = 1;
  a.head_dim = 40;
  a.query_rows = a.output_rows = 4;
  a.key_rows[0] = a.key_rows[1] = 6;
  a.query = a.output = a.terms = rows;
  for (int g = 0; g < 2; ++g) a.keys[g] = a.values[g] = rows;
  a.segments = &segment;
  a.segment_count = 1;
  const auto fails = [&](const char* part, const auto& change) {
    RangedAttention changed = a;
    const Segment before = segment;
    change(changed);
    check_throws<InvalidArgument>(part, [&] { ranged_attention(changed, {}); });
    segment = before;
  };
  fails("heads of size 44", [](RangedAttention& x) { x.head_dim = 44; });
  fails("cannot share 2", [](RangedAttention& x) { x.kv_heads = 2; });
  fails("200 segments; a launch takes at most 128",
        [](RangedAttention& x) { x.segment_count = 200; });
  fails("4 queries from 1 on is out of range; there are 4",
        [&](RangedAttention&) { segment.query = 1; });
  fails("output rows from 1", [&](RangedAttention&) { segment.output = 1; });
  fails("window keys from 3", [&](RangedAttention&) { segment.window = 3; });
  fails("6 context keys from 1", [&](RangedAttention&) { segment.context = 1; });
  fails("a place for the terms", [](RangedAttention& x) { x.terms = {}; });
  fails("dropout is 1", [](RangedAttention& x) { x.dropout = 1; });
  fails("float16", [](RangedAttention& x) { x.dtype = DType::float32; });
}

// A layer of 64 sequences of 1024 tokens in windows of `w`, each with a context of its own.
void bench(int heads, int d, int w, int context, float dropout) {
  const int64_t windows = 65536 / w, rows = windows * w;
  const auto made = [&](int64_t count) {
    auto array = std::make_unique<gpu::Array<bf16>>(count * heads * d);
    gpu::randomise(*array);
    return array;
  };
  const auto query = made(rows), k0 = made(rows), v0 = made(rows), slope = made(rows);
  const auto k1 = made(windows * context), v1 = made(windows * context);
  const auto output = made(rows), terms = made(2 * rows), dq = made(rows), dk0 = made(rows);
  const auto dv0 = made(rows), dk1 = made(windows * context), dv1 = made(windows * context);
  const gpu::Array<float> log_sum_exp(2 * rows * heads), delta(2 * rows * heads);
  const gpu::Array<int64_t> seed(std::vector<int64_t>{12345});
  const auto at = [&](const auto& x, int64_t n) {
    return HeadTensor{x->data(), n * heads * d, d, int64_t{heads} * d};
  };
  const Segment segment{0, w, 0, 0, 0, context};
  RangedAttention a;
  a.batch = windows;
  a.query_rows = a.output_rows = a.key_rows[0] = w;
  a.key_rows[1] = context;
  a.query_heads = a.kv_heads = heads;
  a.head_dim = d;
  a.scale = static_cast<float>(1 / std::sqrt(d));
  a.query = at(query, w);
  a.output = at(output, w);
  a.terms = {terms->data(), int64_t{2} * w * heads * d, d, int64_t{2} * heads * d};
  a.keys[0] = at(k0, w), a.values[0] = at(v0, w);
  a.keys[1] = at(k1, context), a.values[1] = at(v1, context);
  a.segments = &segment;
  a.segment_count = 1;
  a.log_sum_exp = log_sum_exp.data();
  a.dropout = dropout;
  a.seed = seed.data();
  RangedGradient gradient;
  gradient.output = at(slope, w);
  gradient.query = at(dq, w);
  gradient.keys[0] = at(dk0, w), gradient.values[0] = at(dv0, w);
  gradient.keys[1] = at(dk1, context), gradient.values[1] = at(dv1, context);
  gradient.delta = delta.data();
  const double pairs = windows * heads * (w * (w + 1) / 2.0 + 1.0 * w * context);
  char name[100];
  const auto report = [&](const char* what, double flops, const auto& work) {
    const double us = gpu::microseconds(work, 10);
    std::snprintf(name, sizeof(name), "%s: %ld x %d rows, context %d, %d x d%d, dropout %.1f", what,
                  static_cast<long>(windows), w, context, heads, d, dropout);
    gpu::report(name, us, 4.0 * rows * heads * d * 2, flops * d * pairs);
  };
  report("forward", 4, [&](cudaStream_t stream) { ranged_attention(a, {stream}); });
  report("backward", 10,
         [&](cudaStream_t stream) { ranged_attention_gradient(a, gradient, {stream}); });
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::string(arguments[1]) == "bench") {
    for (const float dropout : {0.0f, 0.2f}) {
      bench(12, 36, 256, 256, dropout);
      bench(12, 36, 256, 768, dropout);
      bench(12, 36, 512, 512, dropout);
      bench(8, 64, 256, 256, dropout);
      bench(8, 64, 512, 512, dropout);
    }
    return 0;
  }
  test_shapes();
  test_errors();
  std::puts("ok");
}
