// The kernels between the products of many rows, against float64. `bench` times them instead.
#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda/rows/rows.h"
#include "gpu.h"

using namespace tlinformer;
using namespace tlinformer::cuda;
using gpu::Array;
using gpu::kDType;
using gpu::kRounding;
using gpu::untouched;

namespace {

double value(float x) { return x; }
double value(bf16 x) { return static_cast<float>(x); }
double value(f16 x) { return static_cast<float>(x); }

cudaStream_t stream;

Launch launched(bool early = false) {
  Launch how;
  how.stream = stream;
  how.early = early;
  return how;
}

std::vector<int32_t> some_tokens(size_t count, int32_t vocabulary, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<int32_t> tokens(count);
  for (auto& token : tokens) token = static_cast<int32_t>(generator() % unsigned(vocabulary));
  return tokens;
}

// norm(x) of one row, against `got`.
template <class T, class X>
void check_norm(const X* x, const T* weight, const T* bias, size_t d, double epsilon,
                const T* got) {
  double mean = 0, variance = 0;
  for (size_t i = 0; i < d; ++i) mean += value(x[i]) / double(d);
  for (size_t i = 0; i < d; ++i) variance += std::pow(value(x[i]) - mean, 2) / double(d);
  const double scale = 1 / std::sqrt(variance + epsilon);
  for (size_t i = 0; i < d; ++i) {
    const double a = (value(x[i]) - mean) * scale * value(weight[i]), b = value(bias[i]);
    const double slack = 2e-5 * (std::fabs(a) + std::fabs(b) + std::fabs(mean * scale)) + 1e-6;
    CHECK_CLOSE(value(got[i]), a + b, kRounding<T> * std::fabs(a + b) + slack);
  }
}

template <class T>
void test_norm(size_t rows, size_t d, bool gather, bool keep_x, bool with_norm, bool early,
               unsigned seed, bool by_token = true) {
  const size_t vocabulary = by_token ? 37 : rows;
  auto embed = gpu::normal<T>(vocabulary * d, seed, 0.5f);
  for (auto& e : embed) e = T(float(e) + 3.0f);  // a mean that a one-pass variance would suffer of
  auto rows_of_x = gpu::normal<float>(rows * d, seed + 1, 2.0f);
  for (auto& s : rows_of_x) s -= 7.0f;
  const auto weight = gpu::normal<T>(d, seed + 2), bias = gpu::normal<T>(d, seed + 3);
  const auto tokens = some_tokens(rows, int32_t(vocabulary), seed + 4);

  const Array<T> embed_d(embed), weight_d(weight), bias_d(bias);
  const Array<int32_t> tokens_d(tokens);
  Array<float> x((rows + 1) * d);
  Array<T> normed((rows + 1) * d);
  if (!gather) {
    auto padded = rows_of_x;
    padded.resize((rows + 1) * d, 0.0f);
    std::memset(padded.data() + rows * d, 0xFF, d * sizeof(float));
    x.set(padded);
  }
  const Norm norm{weight_d.data(), bias_d.data(), 1e-5f};
  NormRows n;
  n.dtype = kDType<T>;
  n.rows = int64_t(rows);
  n.hidden_size = int(d);
  n.tokens = gather && by_token ? tokens_d.data() : nullptr;
  n.embed = gather ? embed_d.data() : nullptr;
  n.x = keep_x ? x.data() : nullptr;
  n.norm = with_norm ? &norm : nullptr;
  n.normed = with_norm ? normed.data() : nullptr;
  norm_rows(n, launched(early));
  check(cudaDeviceSynchronize(), "norm_rows");

  const auto x_h = x.get();
  const auto normed_h = normed.get();
  for (size_t row = 0; row < rows; ++row) {
    const T* e = embed.data() + (by_token ? size_t(tokens[row]) : row) * d;
    for (size_t i = 0; i < d && keep_x; ++i) {
      CHECK(x_h[row * d + i] == (gather ? float(e[i]) : rows_of_x[row * d + i]));
    }
    const T* got = normed_h.data() + row * d;
    if (!with_norm) {
      CHECK(untouched(got, d));
    } else if (gather) {
      check_norm(e, weight.data(), bias.data(), d, 1e-5, got);
    } else {
      check_norm(rows_of_x.data() + row * d, weight.data(), bias.data(), d, 1e-5, got);
    }
  }
  CHECK(untouched(x_h.data() + rows * d, d));
  if (!keep_x) CHECK(untouched(x_h.data(), rows * d));
  CHECK(untouched(normed_h.data() + rows * d, d));
}

// `from` (d) rotated to `position`, or copied, against `got`.
template <class T>
void check_rotated(const T* from, size_t d, double theta, int64_t position, bool rotated,
                   const T* got) {
  for (size_t i = 0; i < d; i += 2) {
    const double a = value(from[i]), b = value(from[i + 1]);
    const double angle = rotated ? double(position) * std::pow(theta, -double(i) / double(d)) : 0;
    const double slack = 4e-6 * (std::fabs(a) + std::fabs(b)) + 1e-7;
    const double x = a * std::cos(angle) - b * std::sin(angle);
    const double y = a * std::sin(angle) + b * std::cos(angle);
    CHECK_CLOSE(value(got[i]), x, (rotated ? kRounding<T> * std::fabs(x) + slack : 0));
    CHECK_CLOSE(value(got[i + 1]), y, (rotated ? kRounding<T> * std::fabs(y) + slack : 0));
  }
}

Rope rope_of(int heads, size_t d, double theta) {
  Config config;
  config.num_attention_heads = heads;
  config.hidden_size = int64_t(heads) * int64_t(d);
  config.rope_theta = theta;
  return Rope::of(config);
}

// Lines one after another, or with a gap between them and chosen by tokens. The keys and values of
// the first `apart` rows go to rows of their own, from 1 on.
template <class T>
void test_rotate(size_t rows, size_t q_heads, size_t kv_heads, size_t d, bool with_query,
                 bool with_keys, int64_t begin, size_t slot, unsigned seed, bool by_token = false,
                 size_t apart = 0) {
  const double theta = 10000;
  const size_t vocabulary = 19, count = by_token ? vocabulary : rows, gap = by_token ? 12 : 0;
  const size_t columns = (with_query ? q_heads * d : 0) + (with_keys ? 2 * kv_heads * d : 0);
  const size_t capacity = slot + rows + 3, head_stride = capacity * d + 8;
  const size_t stride = columns + gap;
  const auto lines = gpu::normal<T>(count * stride, seed);
  const Array<T> lines_d(lines);
  const auto tokens = some_tokens(rows, int32_t(vocabulary), seed + 1);
  const Array<int32_t> tokens_d(tokens);
  const auto line_of = [&](size_t row) {
    return &lines[(by_token ? size_t(tokens[row]) : row) * stride];
  };
  Array<T> query((rows + 1) * q_heads * d), keys(kv_heads * head_stride),
      values(kv_heads * head_stride);
  const size_t own_stride = (apart + 2) * d;
  Array<T> own_keys(kv_heads * own_stride), own_values(kv_heads * own_stride);
  RotateRows r;
  r.dtype = kDType<T>;
  r.rows = int64_t(rows);
  r.begin = begin;
  r.query_heads = int(q_heads);
  r.kv_heads = int(kv_heads);
  r.head_dim = int(d);
  r.rope = rope_of(int(q_heads), d, theta);
  r.lines = lines_d.data();
  r.line_stride = int64_t(stride);
  r.tokens = by_token ? tokens_d.data() : nullptr;
  r.query = with_query ? query.data() : nullptr;
  r.keys = with_keys ? keys.data() : nullptr;
  r.values = with_keys ? values.data() : nullptr;
  r.head_stride = int64_t(head_stride);
  r.slot = int64_t(slot);
  r.apart = int64_t(apart);
  r.own = {own_keys.data(), own_values.data(), int64_t(own_stride), 1};
  rotate_rows(r, launched());
  check(cudaDeviceSynchronize(), "rotate_rows");

  const auto query_h = query.get();
  for (size_t row = 0; row < rows && with_query; ++row) {
    for (size_t h = 0; h < q_heads; ++h) {
      check_rotated(line_of(row) + h * d, d, theta, begin + int64_t(row), true,
                    &query_h[(row * q_heads + h) * d]);
    }
  }
  const size_t written = with_query ? rows * q_heads * d : 0;
  CHECK(untouched(query_h.data() + written, query_h.size() - written));
  const size_t k_column = with_query ? q_heads * d : 0, v_column = k_column + kv_heads * d;
  const auto check_cache = [&](const Array<T>& keys, const Array<T>& values, size_t head_stride,
                               size_t slot, size_t first, size_t count) {
    const auto keys_h = keys.get(), values_h = values.get();
    for (size_t h = 0; h < kv_heads; ++h) {
      const T *k = &keys_h[h * head_stride], *v = &values_h[h * head_stride];
      for (size_t i = 0; i < count; ++i) {
        const T* line = line_of(first + i);
        check_rotated(line + k_column + h * d, d, theta, begin + int64_t(first + i), true,
                      k + (slot + i) * d);
        check_rotated(line + v_column + h * d, d, theta, 0, false, v + (slot + i) * d);
      }
      for (const T* part : {k, v}) {
        const size_t end = (slot + count) * d;
        CHECK(untouched(part, slot * d));
        CHECK(untouched(part + end, head_stride - end));
      }
    }
  };
  check_cache(own_keys, own_values, own_stride, 1, 0, apart);
  check_cache(keys, values, head_stride, slot, apart, with_keys ? rows - apart : 0);
}

double silu_of(double x) { return x / (1 + std::exp(-x)); }

template <class T>
void test_silu(size_t rows, size_t columns, unsigned seed) {
  auto gate_up = gpu::normal<T>(rows * 2 * columns, seed, 4.0f);
  const float extremes[] = {0.0f, -0.0f, 30.0f, -30.0f, 88.5f, -88.5f, -104.0f, -30000.0f};
  for (size_t i = 0; i < 8; ++i) gate_up[i] = T(extremes[i]);
  const Array<T> from(gate_up);
  Array<T> to((rows + 1) * columns);
  silu_rows(kDType<T>, from.data(), to.data(), int64_t(rows), int64_t(columns), launched());
  check(cudaDeviceSynchronize(), "silu_rows");
  const auto got = to.get();
  for (size_t i = 0; i < rows * columns; ++i) {
    const size_t row = i / columns, column = i % columns;
    const double gate = value(gate_up[row * 2 * columns + column]);
    const double want = silu_of(gate) * value(gate_up[(row * 2 + 1) * columns + column]);
    CHECK_CLOSE(value(got[i]), want, (kRounding<T> + 2e-6) * std::fabs(want) + 1e-7);
  }
  CHECK(untouched(got.data() + rows * columns, columns));
}

template <class T>
void test_widen(size_t count) {
  const auto values = gpu::normal<T>(count, 5);
  const Array<T> from(values);
  Array<float> to(count + 1);
  widen(kDType<T>, from.data(), to.data(), int64_t(count), launched());
  const auto got = to.get();
  for (size_t i = 0; i < count; ++i) CHECK(got[i] == float(values[i]));
  CHECK(untouched(&got[count], 1));
}

template <class T>
std::vector<T> slice(const Array<T>& of, size_t begin, size_t count) {
  std::vector<T> to(count);
  check(cudaMemcpy(to.data(), of.data() + begin, count * sizeof(T), cudaMemcpyDeviceToHost), "get");
  return to;
}

template <class T>
void put(const Array<T>& to, size_t begin, const std::vector<T>& values) {
  check(cudaMemcpy(to.data() + begin, values.data(), values.size() * sizeof(T),
                   cudaMemcpyHostToDevice),
        "set");
}

// The last row of arrays of more than 2^31 elements; all other rows are NaN.
void test_large() {
  using T = bf16;
  const Launch how = launched();
  {
    const size_t d = 1280, rows = (size_t{1} << 31) / d + 2;
    const auto last = gpu::normal<float>(d, 1);
    const auto weight = gpu::normal<T>(d, 2), bias = gpu::normal<T>(d, 3);
    const Array<T> weight_d(weight), bias_d(bias), normed(rows * d);
    const Array<float> x(rows * d);
    put(x, (rows - 1) * d, last);
    const Norm norm{weight_d.data(), bias_d.data(), 1e-5f};
    NormRows n;
    n.rows = int64_t(rows);
    n.hidden_size = int(d);
    n.x = x.data();
    n.norm = &norm;
    n.normed = normed.data();
    norm_rows(n, how);
    check_norm(last.data(), weight.data(), bias.data(), d, 1e-5,
               slice(normed, (rows - 1) * d, d).data());
  }
  {
    const size_t d = 128, heads = 4, columns = (heads + 2) * d;
    const size_t rows = (size_t{1} << 31) / columns + 2, slot = (size_t{1} << 31) / d;
    const auto last = gpu::normal<T>(columns, 4);
    const Array<T> lines(rows * columns), query(rows * heads * d);
    const Array<T> keys((slot + rows) * d), values((slot + rows) * d);
    put(lines, (rows - 1) * columns, last);
    RotateRows r;
    r.rows = int64_t(rows);
    r.query_heads = int(heads);
    r.kv_heads = 1;
    r.head_dim = int(d);
    r.rope = rope_of(int(heads), d, 10000);
    r.lines = lines.data();
    r.line_stride = int64_t(columns);
    r.query = query.data();
    r.keys = keys.data();
    r.values = values.data();
    r.slot = int64_t(slot);
    rotate_rows(r, how);
    const int64_t position = int64_t(rows) - 1;
    const auto q = slice(query, (rows - 1) * heads * d, heads * d);
    const auto k = slice(keys, (slot + rows - 1) * d, d);
    const auto v = slice(values, (slot + rows - 1) * d, d);
    for (size_t h = 0; h < heads; ++h) {
      check_rotated(&last[h * d], d, 10000, position, true, &q[h * d]);
    }
    check_rotated(&last[heads * d], d, 10000, position, true, k.data());
    check_rotated(&last[(heads + 1) * d], d, 10000, position, false, v.data());
  }
  {
    const size_t columns = 8192, rows = (size_t{1} << 31) / (2 * columns) + 2;
    const auto last = gpu::normal<T>(2 * columns, 6);
    const Array<T> gate_up(rows * 2 * columns), hidden(rows * columns);
    put(gate_up, (rows - 1) * 2 * columns, last);
    silu_rows(DType::bfloat16, gate_up.data(), hidden.data(), int64_t(rows), int64_t(columns), how);
    const auto got = slice(hidden, (rows - 1) * columns, columns);
    for (size_t i = 0; i < columns; ++i) {
      const double want = silu_of(value(last[i])) * value(last[columns + i]);
      CHECK_CLOSE(value(got[i]), want, (kRounding<T> + 2e-6) * std::fabs(want) + 1e-7);
    }
  }
}

template <class T>
void test_all() {
  const size_t sizes[][2] = {{1, 8},     {5, 432},  {33, 512},  {3, 520},
                             {17, 1024}, {2, 1032}, {130, 432}, {7, 2056}};
  unsigned seed = 100;
  for (const auto& [rows, d] : sizes) {
    for (bool early : {false, true}) {
      test_norm<T>(rows, d, true, true, true, early, seed += 10);
      test_norm<T>(rows, d, false, true, true, early, seed += 10);
    }
    test_norm<T>(rows, d, true, false, true, false, seed += 10);
    test_norm<T>(rows, d, true, true, false, false, seed += 10);
    test_norm<T>(rows, d, true, false, true, false, seed += 10, false);
  }
#define TEST_HEAD_SIZE(d)                                                  \
  test_rotate<T>(61, 5, 5, d, true, true, 1234567, 3, seed += 10);         \
  test_rotate<T>(3, 6, 2, d, true, true, 2200000000, 0, seed += 10);       \
  test_rotate<T>(130, 12, 12, d, true, false, 0, 0, seed += 10);           \
  test_rotate<T>(29, 4, 1, d, false, true, 1 << 20, 77, seed += 10);       \
  test_rotate<T>(83, 4, 2, d, true, true, 12345, 6, seed += 10, true);     \
  test_rotate<T>(83, 4, 2, d, true, true, 12345, 6, seed += 10, true, 31); \
  test_rotate<T>(90, 3, 3, d, true, true, 70, 2, seed += 10, false, 64);
  TLINFORMER_HEAD_SIZES(TEST_HEAD_SIZE)
  test_rotate<T>(1, 1, 1, 4, true, true, 9, 1, seed += 10);
  for (const size_t columns : {8, 248, 1280, 1544}) {
    test_silu<T>(1, columns, seed += 10);
    test_silu<T>(37, columns, seed += 10);
  }
  test_widen<T>(1);
  test_widen<T>(433);
  // No rows: nothing is launched, nothing read.
  norm_rows(NormRows{}, launched());
  rotate_rows(RotateRows{}, launched());
  silu_rows(kDType<T>, nullptr, nullptr, 0, 8, launched());
  widen(kDType<T>, nullptr, nullptr, 0, launched());
  RotateRows odd;
  odd.rows = 1;
  odd.head_dim = 6;
  check_throws<InvalidArgument>("6", [&] { rotate_rows(odd, launched()); });
}

void bench(size_t rows, size_t d, size_t heads, size_t f) {
  using T = bf16;
  const size_t vocabulary = 50257, head_dim = d / heads, capacity = size_t{1} << 20;
  const Array<T> embed(gpu::normal<T>(vocabulary * d, 1)), weight(gpu::normal<T>(d, 2)),
      bias(gpu::normal<T>(d, 3));
  const Array<int32_t> tokens(some_tokens(rows, int32_t(vocabulary), 4));
  const Array<float> x(gpu::normal<float>(rows * d, 5));
  const Array<T> normed(rows * d), lines(gpu::normal<T>(rows * 3 * d, 6)), query(rows * d);
  const Array<T> keys(heads * capacity * head_dim), values(heads * capacity * head_dim);
  const Array<T> gate_up(gpu::normal<T>(rows * 2 * f, 7)), hidden(rows * f);
  const std::string size =
      " rows " + std::to_string(rows) + " D " + std::to_string(d) + " F " + std::to_string(f);
  const double items = double(rows * d);
  const Norm norm{weight.data(), bias.data(), 1e-5f};
  NormRows n;
  n.rows = int64_t(rows);
  n.hidden_size = int(d);
  n.x = x.data();
  n.norm = &norm;
  n.normed = normed.data();
  const auto time_norm = [&](const char* name, double bytes) {
    const double us = gpu::microseconds([&](cudaStream_t on) { norm_rows(n, {on}); });
    gpu::report(name + size, us, bytes * items, 8 * items);
  };
  time_norm("norm_rows", 4 + 2);
  n.tokens = tokens.data();
  n.embed = embed.data();
  time_norm("norm_rows of tokens", 2 + 4 + 2);
  n.x = nullptr;
  time_norm("norm_rows of tokens, no x", 2 + 2);

  RotateRows r;
  r.rows = int64_t(rows);
  r.begin = r.slot = 12345;
  r.query_heads = r.kv_heads = int(heads);
  r.head_dim = int(head_dim);
  r.rope = rope_of(int(heads), head_dim, 10000);
  r.lines = lines.data();
  r.head_stride = int64_t(capacity * head_dim);
  const auto time_rotate = [&](const char* name, void* q, void* k, int parts) {
    r.query = q;
    r.keys = k;
    r.values = k != nullptr ? values.data() : nullptr;
    r.line_stride = int64_t(d) * (r.tokens != nullptr ? 3 : parts);
    const double us = gpu::microseconds([&](cudaStream_t on) { rotate_rows(r, {on}); });
    gpu::report(name + size, us, parts * 4 * items, parts * 3 * items);
  };
  time_rotate("rotate_rows q", query.data(), nullptr, 1);
  time_rotate("rotate_rows k v", nullptr, keys.data(), 2);
  time_rotate("rotate_rows q k v", query.data(), keys.data(), 3);
  const Array<T> table(vocabulary * 3 * d);
  gpu::randomise(table);
  r.lines = table.data();
  r.tokens = tokens.data();
  time_rotate("rotate_rows q of tokens", query.data(), nullptr, 1);
  time_rotate("rotate_rows k v of tokens", nullptr, keys.data(), 2);

  const double us = gpu::microseconds([&](cudaStream_t on) {
    silu_rows(DType::bfloat16, gate_up.data(), hidden.data(), int64_t(rows), int64_t(f), {on});
  });
  gpu::report("silu_rows" + size, us, 6.0 * double(rows * f), 6.0 * double(rows * f));
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::string(arguments[1]) == "bench") {
    for (const size_t rows : {2048, 4096, 8192, 16384}) bench(rows, 432, 12, 1280);
    bench(8192, 512, 8, 1536);
    return 0;
  }
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  test_all<bf16>();
  test_all<f16>();
  test_large();
  std::puts("ok");
}
