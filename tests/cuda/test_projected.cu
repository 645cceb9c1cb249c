// The projection that rotates and fills the cache, against float64. `bench` times it, and the
// product and the rotation that it stands for.
#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda/dense/dense.h"
#include "cuda/dense/projected.h"
#include "gpu.h"

using namespace tlinformer;
using namespace tlinformer::cuda;
using gpu::Array;
using gpu::kDType;
using gpu::kRounding;
using gpu::untouched;

namespace {

constexpr double kTheta = 10000;

Rope rope_of(size_t heads, size_t d) {
  Config config;
  config.num_attention_heads = int64_t(heads);
  config.hidden_size = int64_t(heads * d);
  config.rope_theta = kTheta;
  return Rope::of(config);
}

template <class T>
struct Problem {
  size_t rows, inputs, d;
  std::vector<T> input, weight, bias;

  double product(size_t row, size_t column, double& magnitude) const {
    double sum = double(float(bias[column]));
    magnitude += std::fabs(sum);
    for (size_t i = 0; i < inputs; ++i) {
      const double term =
          double(float(input[row * inputs + i])) * double(float(weight[column * inputs + i]));
      sum += term;
      magnitude += std::fabs(term);
    }
    return sum;
  }
  // Columns `column` and the next, which are i and i + 1 of their head, at this position.
  void check(size_t row, size_t column, size_t i, bool rotated, int64_t position,
             const T* got) const {
    double magnitude = 0;
    const double a = product(row, column, magnitude), b = product(row, column + 1, magnitude);
    const double angle = rotated ? double(position) * std::pow(kTheta, -double(i) / double(d)) : 0;
    const double x = a * std::cos(angle) - b * std::sin(angle);
    const double y = a * std::sin(angle) + b * std::cos(angle);
    const double slack = 1.5e-5 * magnitude;
    CHECK_CLOSE(double(float(got[0])), x, kRounding<T> * std::fabs(x) + slack);
    CHECK_CLOSE(double(float(got[1])), y, kRounding<T> * std::fabs(y) + slack);
  }
};

// Input and weights end in NaN, the cache is NaN around what is written.
template <class T>
void test(size_t rows, size_t inputs, size_t q_heads, size_t kv_heads, size_t d, bool with_query,
          bool with_keys, int64_t begin, size_t slot, unsigned seed) {
  const auto with_end = [](std::vector<T> values) {
    values.resize(values.size() + 8192);
    std::memset(values.data() + values.size() - 8192, 0xFF, 8192 * sizeof(T));
    return values;
  };
  const size_t q_columns = with_query ? q_heads * d : 0, k_columns = with_keys ? kv_heads * d : 0;
  const size_t columns = q_columns + 2 * k_columns;
  const Problem<T> problem{rows,
                           inputs,
                           d,
                           gpu::normal<T>(rows * inputs, seed),
                           gpu::normal<T>(columns * inputs, seed + 1, 0.1f),
                           gpu::normal<T>(columns, seed + 2)};
  const Array<T> input(with_end(problem.input)), weight(with_end(problem.weight)),
      bias(problem.bias);
  const size_t capacity = slot + rows + 3, head_stride = capacity * d + 8;
  Array<T> query((rows + 1) * q_heads * d), keys(kv_heads * head_stride),
      values(kv_heads * head_stride);
  ProjectedRows p;
  p.dtype = kDType<T>;
  p.rows = int64_t(rows);
  p.begin = begin;
  p.query_heads = int(q_heads);
  p.kv_heads = int(kv_heads);
  p.head_dim = int(d);
  p.rope = rope_of(q_heads, d);
  p.query = with_query ? query.data() : nullptr;
  p.keys = with_keys ? keys.data() : nullptr;
  p.values = with_keys ? values.data() : nullptr;
  p.head_stride = int64_t(head_stride);
  p.slot = int64_t(slot);
  p.input = input.data();
  p.inputs = int64_t(inputs);
  p.weight = weight.data();
  p.bias = bias.data();
  CHECK(takes_projected_rows(p.dtype, p.inputs, int64_t(columns), p.head_dim));
  projected_rows(p, {});
  check(cudaDeviceSynchronize(), "projected_rows");

  const auto query_h = query.get(), keys_h = keys.get(), values_h = values.get();
  const size_t step = rows * columns * inputs > 20'000'000 ? 62 : 2;
  for (size_t row = 0; row < rows; ++row) {
    const int64_t position = begin + int64_t(row);
    for (size_t c = 2 * row % step; c < columns; c += step) {
      const bool is_query = c < q_columns;
      const size_t of_cache = is_query ? 0 : c - q_columns;
      const bool is_value = !is_query && of_cache >= k_columns;
      const size_t at = is_query ? c : of_cache % k_columns, head = at / d, i = at % d;
      const size_t cached = head * head_stride + (slot + row) * d + i;
      const T* got = is_query   ? &query_h[row * q_heads * d + c]
                     : is_value ? &values_h[cached]
                                : &keys_h[cached];
      problem.check(row, c, i, !is_value, position, got);
    }
  }
  const size_t written = with_query ? rows * q_heads * d : 0;
  CHECK(untouched(query_h.data() + written, query_h.size() - written));
  for (size_t h = 0; h < kv_heads; ++h) {
    for (const T* part : {&keys_h[h * head_stride], &values_h[h * head_stride]}) {
      const size_t end = with_keys ? (slot + rows) * d : 0;
      CHECK(untouched(part, with_keys ? slot * d : 0));
      CHECK(untouched(part + end, head_stride - end));
    }
  }
}

template <class T>
void test_all() {
  unsigned seed = 5;
  for (const size_t rows : {1, 64, 128, 130, 300}) {
    test<T>(rows, 432, 12, 12, 36, true, true, 1234567, 3, seed += 10);
    test<T>(rows, 432, 12, 12, 36, false, true, 1 << 20, 77, seed += 10);
    test<T>(rows, 432, 12, 12, 36, true, false, 0, 0, seed += 10);
  }
  test<T>(200, 72, 4, 2, 36, true, true, 9, 1, seed += 10);
  test<T>(150, 256, 8, 2, 32, true, true, 100, 5, seed += 10);
  test<T>(150, 80, 2, 2, 40, true, true, 100, 5, seed += 10);
  test<T>(150, 96, 2, 1, 48, true, true, 100, 5, seed += 10);
  test<T>(256, 512, 8, 8, 64, true, true, 2000000000, 0, seed += 10);
  test<T>(140, 160, 2, 2, 80, true, true, 4096, 6, seed += 10);
  test<T>(140, 192, 2, 1, 96, true, true, 4096, 6, seed += 10);
  test<T>(140, 256, 2, 1, 128, true, true, 4096, 6, seed += 10);
  test<T>(20000, 432, 12, 12, 36, false, true, 1 << 20, 7, seed += 10);
}

void bench(size_t rows, size_t d, size_t heads) {
  using T = bf16;
  const size_t head_dim = d / heads, capacity = size_t{1} << 20;
  const Array<char> workspace(size_t(Dense::workspace_bytes()));
  Dense dense(DType::bfloat16, workspace.data(), Dense::workspace_bytes());
  const Array<T> input(gpu::normal<T>(rows * d, 1)), weight(gpu::normal<T>(3 * d * d, 2, 0.05f)),
      bias(gpu::normal<T>(3 * d, 3)), lines(rows * 3 * d), query(rows * d);
  const Array<T> keys(heads * capacity * head_dim), values(heads * capacity * head_dim);
  const auto time = [&](const char* name, void* q, void* k, size_t parts) {
    ProjectedRows p;
    p.rows = int64_t(rows);
    p.begin = p.slot = 12345;
    p.query_heads = p.kv_heads = int(heads);
    p.head_dim = int(head_dim);
    p.rope = rope_of(heads, head_dim);
    p.query = q;
    p.keys = k;
    p.values = k != nullptr ? values.data() : nullptr;
    p.head_stride = int64_t(capacity * head_dim);
    p.input = input.data();
    p.inputs = int64_t(d);
    p.weight = weight.data();
    p.bias = bias.data();
    p.lines = lines.data();
    p.line_stride = int64_t(parts * d);
    const double bytes = 2.0 * double(rows * d * (1 + parts) + parts * d * d);
    const double flops = 2.0 * double(rows * d * parts * d);
    const std::string size =
        std::string(name) + " rows " + std::to_string(rows) + " D " + std::to_string(d);
    const double us = gpu::microseconds([&](cudaStream_t on) { projected_rows(p, {on}); });
    gpu::report("projected_rows " + size, us, bytes, flops);
    const double apart = gpu::microseconds([&](cudaStream_t on) {
      dense.product(input.data(), p.rows, weight.data(), bias.data(), p.line_stride, p.inputs,
                    lines.data(), p.line_stride, {on});
      rotate_rows(p, {on});
    });
    gpu::report("a product and rotate_rows " + size, apart, bytes, flops);
  };
  time("q", query.data(), nullptr, 1);
  time("k v", nullptr, keys.data(), 2);
  time("q k v", query.data(), keys.data(), 3);
}

}  // namespace

int main(int count, char** arguments) {
  if (!takes_projected_rows(DType::bfloat16, 432, 864, 36)) {
    std::puts("no kernel for this device");
    return 77;
  }
  if (count > 1 && std::string(arguments[1]) == "bench") {
    for (const size_t rows : {256, 4096, 8192, 16384, 16896}) bench(rows, 432, 12);
    bench(16384, 512, 8);
    return 0;
  }
  CHECK(!takes_projected_rows(DType::bfloat16, 520, 1040, 40));
  CHECK(!takes_projected_rows(DType::bfloat16, 432, 872, 36));
  test_all<bf16>();
  test_all<f16>();
  std::puts("ok");
}
