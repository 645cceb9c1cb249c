// Matrix products of many rows, against float64. `bench` times those of a slide instead.
#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda/dense/dense.h"
#include "gpu.h"

using namespace tlinformer;
using namespace tlinformer::cuda;
using gpu::Array;
using gpu::kDType;
using gpu::kRounding;
using gpu::untouched;

namespace {

cudaStream_t stream;

Launch launched() {
  Launch how;
  how.stream = stream;
  return how;
}

// input weight^T + bias in float64, of one entry, and the sum of its terms' magnitudes.
struct Problem {
  size_t rows, outputs, inputs;
  std::vector<double> input, weight, bias;

  struct Entry {
    double value, magnitude;
  };
  Entry at(size_t row, size_t output, bool with_bias) const {
    Entry entry{with_bias ? bias[output] : 0, with_bias ? std::fabs(bias[output]) : 0};
    for (size_t i = 0; i < inputs; ++i) {
      const double term = input[row * inputs + i] * weight[output * inputs + i];
      entry.value += term;
      entry.magnitude += std::fabs(term);
    }
    return entry;
  }
  // All entries of a small problem, some of each row of a large one.
  template <class Check>
  void each(const Check& check) const {
    const size_t step = rows * outputs * inputs > 20'000'000 ? 61 : 1;
    for (size_t row = 0; row < rows; ++row) {
      for (size_t output = row % step; output < outputs; output += step) check(row, output);
    }
  }
};

// A matrix to multiply by is a slice of a larger one: its rows `skipped` ... of it.
template <class T>
void test_products(Dense& dense, size_t rows, size_t outputs, size_t inputs, size_t gap,
                   size_t skipped, unsigned seed) {
  const auto input = gpu::normal<T>(rows * inputs, seed);
  const auto weight = gpu::normal<T>(outputs * inputs, seed + 1, 0.1f);
  const auto bias = gpu::normal<T>(outputs, seed + 2);
  const Problem problem{
      rows, outputs, inputs, gpu::doubles(input), gpu::doubles(weight), gpu::doubles(bias)};
  const Array<T> input_d(input);
  const Array<T> weights((skipped + outputs) * inputs), biases(skipped + outputs);
  check(cudaMemcpy(weights.data() + skipped * inputs, weight.data(), weight.size() * sizeof(T),
                   cudaMemcpyHostToDevice),
        "weight");
  check(cudaMemcpy(biases.data() + skipped, bias.data(), bias.size() * sizeof(T),
                   cudaMemcpyHostToDevice),
        "bias");
  const T* const weight_d = weights.data() + skipped * inputs;
  const T* const bias_d = biases.data() + skipped;
  std::vector<float> wide_bias(bias.begin(), bias.end());
  const Array<float> wide_bias_d(wide_bias);
  const auto before = gpu::normal<float>(rows * outputs, seed + 3, 3.0f);

  for (const bool with_bias : {true, false}) {
    const size_t stride = outputs + gap;
    const Array<T> to((rows + 1) * stride);
    dense.product(input_d.data(), int64_t(rows), weight_d, with_bias ? bias_d : nullptr,
                  int64_t(outputs), int64_t(inputs), to.data() + gap, int64_t(stride), launched());
    check(cudaStreamSynchronize(stream), "product");
    const auto got = to.get();
    problem.each([&](size_t row, size_t output) {
      const auto want = problem.at(row, output, with_bias);
      CHECK_CLOSE(double(float(got[row * stride + gap + output])), want.value,
                  kRounding<T> * std::fabs(want.value) + 1e-5 * want.magnitude);
    });
    for (size_t row = 0; row < rows; ++row) CHECK(untouched(&got[row * stride], gap));
    CHECK(untouched(&got[rows * stride + gap], outputs));

    std::vector<float> start = before;
    start.resize((rows + 1) * outputs);
    std::memset(&start[rows * outputs], 0xFF, outputs * sizeof(float));
    const Array<float> x(start);
    dense.add(input_d.data(), int64_t(rows), weight_d, with_bias ? wide_bias_d.data() : nullptr,
              int64_t(outputs), int64_t(inputs), x.data(), launched());
    check(cudaStreamSynchronize(stream), "add");
    const auto sum = x.get();
    problem.each([&](size_t row, size_t output) {
      const auto want = problem.at(row, output, with_bias);
      const double old = before[row * outputs + output];
      CHECK_CLOSE(sum[row * outputs + output], old + want.value,
                  1e-5 * (want.magnitude + std::fabs(old)));
    });
    CHECK(untouched(&sum[rows * outputs], outputs));

    const Array<float> fresh((rows + 1) * outputs);  // NaN before
    dense.set(input_d.data(), int64_t(rows), weight_d, with_bias ? wide_bias_d.data() : nullptr,
              int64_t(outputs), int64_t(inputs), fresh.data(), launched());
    check(cudaStreamSynchronize(stream), "set");
    const auto set = fresh.get();
    problem.each([&](size_t row, size_t output) {
      const auto want = problem.at(row, output, with_bias);
      CHECK_CLOSE(set[row * outputs + output], want.value, 1e-5 * want.magnitude);
    });
    CHECK(untouched(&set[rows * outputs], outputs));
  }
}

template <class T>
void test_all() {
  const Array<char> workspace(size_t(Dense::workspace_bytes()));
  Dense dense(kDType<T>, workspace.data(), Dense::workspace_bytes());
  unsigned seed = 7;
  for (const size_t rows : {1, 3, 37, 256, 300}) {
    test_products<T>(dense, rows, 432, 432, 0, 0, seed += 10);
    test_products<T>(dense, rows, 864, 432, 0, 432, seed += 10);
    test_products<T>(dense, rows, 40, 1288, 8, 8, seed += 10);
  }
  // The same shapes again, elsewhere in memory.
  test_products<T>(dense, 37, 432, 432, 0, 8, seed += 10);
  test_products<T>(dense, 37, 432, 432, 0, 16, seed += 10);
  test_products<T>(dense, 1025, 1280, 432, 1280, 0, seed += 10);
  test_products<T>(dense, 4096, 432, 1280, 0, 0, seed += 10);
  test_products<T>(dense, 9, 8, 8, 24, 0, seed += 10);
  // No rows: nothing happens.
  dense.product(nullptr, 0, nullptr, nullptr, 8, 8, nullptr, 8, launched());
  dense.set(nullptr, 0, nullptr, nullptr, 8, 8, nullptr, launched());
  dense.add(nullptr, 0, nullptr, nullptr, 8, 8, nullptr, launched());
  // More shapes than are kept.
  const Array<T> input(gpu::normal<T>(1100 * 8, 1)), weight(gpu::normal<T>(64, 2)), to(1100 * 8);
  for (int64_t rows = 1; rows <= 1100; ++rows) {
    dense.product(input.data(), rows, weight.data(), nullptr, 8, 8, to.data(), 8, launched());
  }
  check(cudaStreamSynchronize(stream), "products");
  // A stride below the row's length fails, and says so; the next call works.
  check_throws<Error>("CUBLAS_STATUS", [&] {
    dense.product(input.data(), 16, weight.data(), nullptr, 8, 8, to.data(), 0, launched());
  });
  test_products<T>(dense, 16, 64, 8, 0, 0, seed);
}

void bench(size_t rows, size_t d, size_t f) {
  using T = bf16;
  const Array<char> workspace(size_t(Dense::workspace_bytes()));
  Dense dense(DType::bfloat16, workspace.data(), Dense::workspace_bytes());
  const Array<T> input(gpu::normal<T>(rows * d, 1)), hidden(gpu::normal<T>(rows * f, 2)),
      weight(gpu::normal<T>(2 * f * d, 3, 0.05f)), bias(gpu::normal<T>(3 * d, 4)), to(rows * 2 * f);
  const Array<float> wide_bias(gpu::normal<float>(d, 5)), x(gpu::normal<float>(rows * d, 6));
  const auto row_count = int64_t(rows);
  const auto time = [&](const std::string& name, size_t outputs, size_t inputs, size_t to_bytes,
                        const auto& work) {
    const double bytes =
        2.0 * double(rows * inputs + outputs * inputs) + double(rows * outputs * to_bytes);
    gpu::report(name + " rows " + std::to_string(rows) + " " + std::to_string(inputs) + " to " +
                    std::to_string(outputs),
                gpu::microseconds(work), bytes, 2.0 * double(rows * outputs * inputs));
  };
  const auto time_product = [&](const char* name, size_t outputs, size_t stride, bool with_bias) {
    time(name, outputs, d, 2, [&](cudaStream_t on) {
      dense.product(input.data(), row_count, weight.data(), with_bias ? bias.data() : nullptr,
                    int64_t(outputs), int64_t(d), to.data(), int64_t(stride), {on});
    });
  };
  time_product("q", d, d, true);
  time_product("q k v", 3 * d, 3 * d, true);
  time_product("k v", 2 * d, 2 * d, true);
  time("out, float32", d, d, 4, [&](cudaStream_t on) {
    dense.set(input.data(), row_count, weight.data(), wide_bias.data(), int64_t(d), int64_t(d),
              x.data(), {on});
  });
  time("out, added", d, d, 8, [&](cudaStream_t on) {
    dense.add(input.data(), row_count, weight.data(), wide_bias.data(), int64_t(d), int64_t(d),
              x.data(), {on});
  });
  time_product("gate or up, into rows of both", f, 2 * f, false);
  time_product("gate and up as one matrix", 2 * f, 2 * f, false);
  time("down, float32", d, f, 4, [&](cudaStream_t on) {
    dense.set(hidden.data(), row_count, weight.data(), nullptr, int64_t(d), int64_t(f), x.data(),
              {on});
  });
  time("down, 16 bits", d, f, 2, [&](cudaStream_t on) {
    dense.product(hidden.data(), row_count, weight.data(), nullptr, int64_t(d), int64_t(f),
                  to.data(), int64_t(d), {on});
  });
  time("down, added", d, f, 8, [&](cudaStream_t on) {
    dense.add(hidden.data(), row_count, weight.data(), nullptr, int64_t(d), int64_t(f), x.data(),
              {on});
  });
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::string(arguments[1]) == "bench") {
    for (const size_t rows : {256, 4096, 8192, 8448, 16384}) bench(rows, 432, 1280);
    bench(8192, 512, 1536);
    return 0;
  }
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  test_all<bf16>();
  test_all<f16>();
  std::puts("ok");
}
