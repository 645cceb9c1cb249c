// The gated product, against float64. `bench` times it, and the products and the activation that it
// stands for.
#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda/dense/dense.h"
#include "cuda/dense/gated.h"
#include "cuda/rows/rows.h"
#include "gpu.h"

using namespace tlinformer;
using namespace tlinformer::cuda;
using gpu::Array;
using gpu::kDType;
using gpu::kRounding;
using gpu::untouched;

namespace {

struct Sum {
  double value = 0, magnitude = 0;
};

Sum dot(const double* a, const double* b, size_t count) {
  Sum sum;
  for (size_t i = 0; i < count; ++i) {
    sum.value += a[i] * b[i];
    sum.magnitude += std::fabs(a[i] * b[i]);
  }
  return sum;
}

// All arrays end in NaN.
template <class T>
void test(size_t rows, size_t inputs, size_t outputs, unsigned seed) {
  const auto with_end = [](std::vector<T> values) {
    values.resize(values.size() + 4096);
    std::memset(values.data() + values.size() - 4096, 0xFF, 4096 * sizeof(T));
    return values;
  };
  const auto input = gpu::normal<T>(rows * inputs, seed);
  const auto gate = gpu::normal<T>(outputs * inputs, seed + 1, 0.1f);
  const auto up = gpu::normal<T>(outputs * inputs, seed + 2, 0.1f);
  const Array<T> input_d(with_end(input)), gate_d(with_end(gate)), up_d(with_end(up));
  const Array<T> hidden((rows + 1) * outputs);
  gated_product({kDType<T>, int64_t(rows), int64_t(inputs), int64_t(outputs), input_d.data(),
                 gate_d.data(), up_d.data(), hidden.data()},
                {});
  check(cudaDeviceSynchronize(), "gated_product");
  const auto got = hidden.get();
  const auto x = gpu::doubles(input), g = gpu::doubles(gate), u = gpu::doubles(up);
  const size_t step = rows * outputs * inputs > 20'000'000 ? 61 : 1;
  for (size_t row = 0; row < rows; ++row) {
    for (size_t output = row % step; output < outputs; output += step) {
      const Sum a = dot(&x[row * inputs], &g[output * inputs], inputs);
      const Sum b = dot(&x[row * inputs], &u[output * inputs], inputs);
      const double silu = a.value / (1 + std::exp(-a.value)), want = silu * b.value;
      const double slack = 1e-5 * (1.1 * a.magnitude * std::fabs(b.value) +
                                   std::fabs(silu) * b.magnitude + a.magnitude * b.magnitude);
      CHECK_CLOSE(double(float(got[row * outputs + output])), want,
                  kRounding<T> * std::fabs(want) + slack + 1e-7);
    }
  }
  CHECK(untouched(&got[rows * outputs], outputs));
}

template <class T>
void test_all() {
  unsigned seed = 3;
  for (const size_t rows : {1, 64, 65, 128, 129, 300}) {
    test<T>(rows, 432, 1280, seed += 10);
    test<T>(rows, 72, 160, seed += 10);
  }
  test<T>(37, 8, 32, seed += 10);
  test<T>(250, 64, 128, seed += 10);
  test<T>(131, 448, 96, seed += 10);
  test<T>(77, 456, 1312, seed += 10);
  test<T>(256, 512, 1536, seed += 10);
  test<T>(1000, 432, 1280, seed += 10);
  test<T>(20000, 432, 1280, seed += 10);
  gated_product({kDType<T>, 0, 8, 32}, {});  // nothing is launched, nothing read
}

void bench(size_t rows, size_t d, size_t f) {
  using T = bf16;
  const Array<char> workspace(size_t(Dense::workspace_bytes()));
  Dense dense(DType::bfloat16, workspace.data(), Dense::workspace_bytes());
  const Array<T> input(gpu::normal<T>(rows * d, 1)), gate(gpu::normal<T>(f * d, 2, 0.05f)),
      up(gpu::normal<T>(f * d, 3, 0.05f)), both(rows * 2 * f), hidden(rows * f);
  const int64_t n = int64_t(rows), inputs = int64_t(d), outputs = int64_t(f);
  const std::string size =
      " rows " + std::to_string(rows) + " " + std::to_string(d) + " to 2 x " + std::to_string(f);
  const double bytes = 2.0 * double(rows * (d + f) + 2 * d * f), flops = 4.0 * double(rows * d * f);
  const double us = gpu::microseconds([&](cudaStream_t on) {
    gated_product(
        {DType::bfloat16, n, inputs, outputs, input.data(), gate.data(), up.data(), hidden.data()},
        {on});
  });
  gpu::report("gated_product" + size, us, bytes, flops);
  const double apart = gpu::microseconds([&](cudaStream_t on) {
    dense.product(input.data(), n, gate.data(), nullptr, outputs, inputs, both.data(), 2 * outputs,
                  {on});
    dense.product(input.data(), n, up.data(), nullptr, outputs, inputs, both.data() + f,
                  2 * outputs, {on});
    silu_rows(DType::bfloat16, both.data(), hidden.data(), n, outputs, {on});
  });
  gpu::report("two products and silu_rows" + size, apart, bytes, flops);
}

}  // namespace

int main(int count, char** arguments) {
  if (!takes_gated_product(DType::bfloat16, 432, 1280)) {
    std::puts("no kernel for this device");
    return 77;
  }
  if (count > 1 && std::string(arguments[1]) == "bench") {
    for (const size_t rows : {256, 4096, 8192, 16384, 16896, 32768}) bench(rows, 432, 1280);
    for (const size_t rows : {256, 16384}) bench(rows, 512, 1536);
    return 0;
  }
  CHECK(!takes_gated_product(DType::bfloat16, 520, 1280));
  CHECK(!takes_gated_product(DType::bfloat16, 432, 1288));
  test_all<bf16>();
  test_all<f16>();
  std::puts("ok");
}
