// The gated product, against float64. `bench` times it, and the norm, the products and the
// activation that it stands for.
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

constexpr size_t kEnd = 4096;  // of NaN, behind every array
constexpr double kEpsilon = 1e-5;

template <class T>
std::vector<T> with_end(std::vector<T> values) {
  values.resize(values.size() + kEnd);
  std::memset(values.data() + values.size() - kEnd, 0xFF, kEnd * sizeof(T));
  return values;
}

struct Sum {
  double value = 0, magnitude = 0, largest = 0;  // largest: of the terms
};

Sum dot(const double* a, const double* b, size_t count) {
  Sum sum;
  for (size_t i = 0; i < count; ++i) {
    const double term = a[i] * b[i];
    sum.value += term;
    sum.magnitude += std::fabs(term);
    sum.largest = std::max(sum.largest, std::fabs(term));
  }
  return sum;
}

// norm(x), rounded to T as the kernel does it.
template <class T>
std::vector<double> normed(const float* x, const std::vector<T>& weight,
                           const std::vector<T>& bias) {
  const size_t d = weight.size();
  double mean = 0, variance = 0;
  for (size_t i = 0; i < d; ++i) mean += double(x[i]) / double(d);
  for (size_t i = 0; i < d; ++i) variance += std::pow(double(x[i]) - mean, 2) / double(d);
  std::vector<double> to;
  for (size_t i = 0; i < d; ++i) {
    const double unit = (double(x[i]) - mean) / std::sqrt(variance + kEpsilon);
    to.push_back(double(float(T(float(unit * double(float(weight[i])) + double(float(bias[i])))))));
  }
  return to;
}

template <class T>
struct Problem {
  size_t rows, inputs, outputs;
  std::vector<T> norm_weight, norm_bias, gate, up;
  std::vector<double> gate_of_doubles = gpu::doubles(gate), up_of_doubles = gpu::doubles(up);

  // Of any row some outputs, of few rows all.
  void check(const std::vector<float>& x, const std::vector<T>& got) const {
    const size_t step = rows * outputs * inputs > 20'000'000 ? 61 : 1;
    for (size_t row = 0; row < rows; ++row) {
      const auto input = normed(&x[row * inputs], norm_weight, norm_bias);
      for (size_t output = row % step; output < outputs; output += step) {
        const Sum a = dot(input.data(), &gate_of_doubles[output * inputs], inputs);
        const Sum b = dot(input.data(), &up_of_doubles[output * inputs], inputs);
        const double silu = a.value / (1 + std::exp(-a.value)), want = silu * b.value;
        // A few inputs may lie so that float32 rounds them to the other neighbour.
        const double of_a = 1e-5 * a.magnitude + 8 * kRounding<T> * a.largest;
        const double of_b = 1e-5 * b.magnitude + 8 * kRounding<T> * b.largest;
        CHECK_CLOSE(double(float(got[row * outputs + output])), want,
                    kRounding<T> * std::fabs(want) + 1.1 * of_a * std::fabs(b.value) +
                        std::fabs(silu) * of_b + of_a * of_b + 1e-7);
      }
    }
    CHECK(untouched(&got[rows * outputs], outputs));
  }
};

// Once x is given, once made of tokens and a branch. All arrays end in NaN.
template <class T>
void test(size_t rows, size_t inputs, size_t outputs, unsigned seed) {
  constexpr size_t kVocabulary = 37;
  const Problem<T> problem{rows,
                           inputs,
                           outputs,
                           gpu::normal<T>(inputs, seed),
                           gpu::normal<T>(inputs, seed + 1),
                           gpu::normal<T>(outputs * inputs, seed + 2, 0.1f),
                           gpu::normal<T>(outputs * inputs, seed + 3, 0.1f)};
  auto x = gpu::normal<float>(rows * inputs, seed + 4, 2.0f);
  for (float& v : x) v -= 7.0f;  // a mean that a one-pass variance would suffer of
  const Array<T> weight_d(with_end(problem.norm_weight)), bias_d(with_end(problem.norm_bias)),
      gate_d(with_end(problem.gate)), up_d(with_end(problem.up));
  const Array<float> x_d(with_end(x));
  GatedProduct p;
  p.dtype = kDType<T>;
  p.rows = int64_t(rows);
  p.inputs = int64_t(inputs);
  p.outputs = int64_t(outputs);
  p.norm = {weight_d.data(), bias_d.data(), float(kEpsilon)};
  p.gate = gate_d.data();
  p.up = up_d.data();
  const auto run = [&](float* of) {
    const Array<T> hidden((rows + 1) * outputs);
    p.x = of;
    p.hidden = hidden.data();
    gated_product(p, {});
    check(cudaDeviceSynchronize(), "gated_product");
    return hidden.get();
  };
  problem.check(x, run(x_d.data()));
  const auto after = x_d.get();
  CHECK(std::equal(x.begin(), x.end(), after.begin()));

  const auto embed = gpu::normal<T>(kVocabulary * inputs, seed + 5);
  std::vector<int32_t> tokens;
  for (size_t row = 0; row < rows; ++row) {
    tokens.push_back(int32_t((7 * row + seed) % kVocabulary));
    for (size_t i = 0; i < inputs; ++i) {
      x[row * inputs + i] += float(embed[size_t(tokens[row]) * inputs + i]);
    }
  }
  const Array<T> embed_d(with_end(embed));
  const Array<int32_t> tokens_d(with_end(tokens));
  const Array<float> made(x.size() + kEnd);
  p.embed = embed_d.data();
  p.tokens = tokens_d.data();
  p.branch = x_d.data();
  problem.check(x, run(made.data()));
  const auto made_h = made.get();
  CHECK(std::equal(x.begin(), x.end(), made_h.begin()));
  CHECK(untouched(&made_h[x.size()], kEnd));
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
  const Array<T> embed(gpu::normal<T>(1000 * d, 1)), gate(gpu::normal<T>(f * d, 2, 0.05f)),
      up(gpu::normal<T>(f * d, 3, 0.05f)), weight(gpu::normal<T>(d, 4)), bias(gpu::normal<T>(d, 5)),
      between(rows * d), both(rows * 2 * f), hidden(rows * f);
  const Array<float> branch(gpu::normal<float>(rows * d, 6)), x(gpu::normal<float>(rows * d, 7));
  std::vector<int32_t> some(rows);
  for (size_t i = 0; i < rows; ++i) some[i] = int32_t(i * 37 % 1000);
  const Array<int32_t> tokens(some);
  const Norm norm{weight.data(), bias.data(), float(kEpsilon)};
  const int64_t n = int64_t(rows), inputs = int64_t(d), outputs = int64_t(f);
  const double bytes = 4.0 * double(rows * d) + 2.0 * double(rows * f + 2 * d * f);
  const auto time = [&](const std::string& name, double bytes, const auto& work) {
    gpu::report(name + " rows " + std::to_string(rows) + " " + std::to_string(d) + " to 2 x " +
                    std::to_string(f),
                gpu::microseconds(work), bytes, 4.0 * double(rows * d * f));
  };
  GatedProduct p{DType::bfloat16, n,         inputs,       outputs, x.data(), norm,
                 gate.data(),     up.data(), hidden.data()};
  time("gated_product", bytes, [&](cudaStream_t on) { gated_product(p, {on}); });
  time("norm_rows, two products, silu_rows", bytes, [&](cudaStream_t on) {
    NormRows before;
    before.rows = n;
    before.hidden_size = int(d);
    before.x = x.data();
    before.norm = &norm;
    before.normed = between.data();
    norm_rows(before, {on});
    dense.product(between.data(), n, gate.data(), nullptr, outputs, inputs, both.data(),
                  2 * outputs, {on});
    dense.product(between.data(), n, up.data(), nullptr, outputs, inputs, both.data() + f,
                  2 * outputs, {on});
    silu_rows(DType::bfloat16, both.data(), hidden.data(), n, outputs, {on});
  });
  p.embed = embed.data();
  p.tokens = tokens.data();
  p.branch = branch.data();
  time("gated_product with tokens", bytes + 6.0 * double(rows * d),
       [&](cudaStream_t on) { gated_product(p, {on}); });
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
