// Every instruction set this machine has, against plain double loops on uneven sizes.
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/rope.h"

using namespace tlinformer::cpu;

namespace {

std::mt19937 generator(1);

std::vector<float> normal(int64_t n, float scale = 1) {
  std::normal_distribution<float> draw(0, scale);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = draw(generator);
  return values;
}

float widened(float x) { return x; }
float widened(bf16 x) {
  float to;
  const uint32_t bits = uint32_t{x.bits} << 16;
  __builtin_memcpy(&to, &bits, 4);
  return to;
}

template <class T>
std::vector<T> narrowed(const Kernels& kernels, const std::vector<float>& from) {
  std::vector<T> to(from.size());
  typed<T>(kernels).narrow(from.data(), static_cast<int64_t>(from.size()), to.data());
  return to;
}

template <class T>
void test_gemv(const Kernels& kernels) {
  for (int64_t k : {1, 7, 16, 36, 72, 133}) {
    for (int64_t m = 1; m <= kGemvRows; ++m) {
      const int64_t n = 11, begin = 2;
      const auto w = narrowed<T>(kernels, normal(n * k));
      const auto x = normal(m * k), bias = normal(n);
      auto y = normal(m * n);
      const auto before = y;
      typed<T>(kernels).gemv(w.data(), bias.data(), x.data(), k, m, k, begin, n - 1, true, y.data(),
                             n);
      for (int64_t r = 0; r < m; ++r) {
        for (int64_t j = 0; j < n; ++j) {
          double want = before[size_t(r * n + j)];
          if (j >= begin && j < n - 1) {
            want += bias[size_t(j)];
            for (int64_t i = 0; i < k; ++i) {
              want += double(widened(w[size_t(j * k + i)])) * x[size_t(r * k + i)];
            }
          }
          CHECK_CLOSE(y[size_t(r * n + j)], want, 1e-4);
        }
      }
    }
  }
}

// o of one query row over keys [0, n), in double.
template <class T>
std::vector<double> attention(const float* q, const T* k, const T* v, int64_t n, int64_t d) {
  std::vector<double> p, out(size_t(d), 0.0);
  double total = 0;
  for (int64_t key = 0; key < n; ++key) {
    double score = 0;
    for (int64_t i = 0; i < d; ++i) score += double(q[i]) * widened(k[key * d + i]);
    p.push_back(std::exp2(score));
    total += p.back();
  }
  for (int64_t key = 0; key < n; ++key) {
    for (int64_t i = 0; i < d; ++i)
      out[size_t(i)] += p[size_t(key)] / total * widened(v[key * d + i]);
  }
  return out;
}

template <class T>
void test_attention(const Kernels& kernels) {
  for (int64_t d : {2, 12, 36, 64, 130}) {
    const int64_t n = 301;
    const auto k = narrowed<T>(kernels, normal(n * d)), v = narrowed<T>(kernels, normal(n * d));
    const auto q = normal(14 * d, kScoreScale / std::sqrt(float(d)));
    // decode: two query heads on one key/value head, two parts merged by hand
    const int64_t cut = 77;
    std::vector<float> a(size_t(2 * (d + 2))), b(a);
    typed<T>(kernels).decode(q.data(), 2, k.data(), v.data(), 0, cut, d, a.data());
    typed<T>(kernels).decode(q.data(), 2, k.data(), v.data(), cut, n, d, b.data());
    for (int64_t h = 0; h < 2; ++h) {
      const auto want = attention(q.data() + h * d, k.data(), v.data(), n, d);
      const float *sa = a.data() + h * (d + 2), *sb = b.data() + h * (d + 2);
      const double wa = std::exp2(double(sa[0]) - sb[0]);
      for (int64_t i = 0; i < d; ++i) {
        CHECK_CLOSE((wa * sa[2 + i] + sb[2 + i]) / (wa * sa[1] + sb[1]), want[size_t(i)], 2e-5);
      }
    }
    // tile: causal and not, in two pieces, diagonals on both sides of an edge of a tile; rows are
    // apart, NaN between them and in the values of keys that nobody sees
    const int64_t ldk = d + 3, ldv = d + 1;
    const std::pair<int64_t, int64_t> blocks[] = {{14, 282}, {14, 124}, {14, 0}, {14, -1},
                                                  {2, 127},  {2, 0},    {2, -1}};
    for (const auto& [rows, diagonal] : blocks) {
      const bool causal = diagonal >= 0;
      const int64_t last = causal ? diagonal + rows : n;
      const auto spaced = [&](const std::vector<T>& from, int64_t ld, int64_t keys) {
        auto to = narrowed<T>(kernels, std::vector<float>(size_t(n * ld), NAN));
        for (int64_t i = 0; i < keys * d; ++i) to[size_t(i / d * ld + i % d)] = from[size_t(i)];
        return to;
      };
      const auto wide_k = spaced(k, ldk, last), wide_v = spaced(v, ldv, last);
      std::vector<float> out(size_t(rows * d), 0.0f), state, scratch(tile_scratch_floats(d));
      for (int64_t r = 0; r < rows; ++r) state.insert(state.end(), {-INFINITY, 0.0f});
      TileArgs<T> args;
      args.q = q.data();
      args.out = out.data();
      args.state = state.data();
      args.ldq = d;
      args.ld_state = 2;
      args.rows = rows;
      args.k = wide_k.data();
      args.v = wide_v.data();
      args.ldk = ldk;
      args.ldv = ldv;
      args.d = d;
      args.causal = causal;
      args.diagonal = diagonal;
      args.scratch = scratch.data();
      for (int64_t begin : {int64_t{0}, kTileKeys}) {
        args.begin = begin;
        args.end = begin == 0 ? kTileKeys : n;
        typed<T>(kernels).tile(args);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t sees = causal ? diagonal + r + 1 : n;
        const auto want = attention(q.data() + r * d, k.data(), v.data(), sees, d);
        for (int64_t i = 0; i < d; ++i) {
          CHECK_CLOSE(out[size_t(r * d + i)] / state[size_t(2 * r + 1)], want[size_t(i)], 2e-5);
        }
      }
    }
  }
}

void test_elementwise(const Kernels& kernels) {
  for (int64_t n : {1, 5, 16, 36, 77}) {
    const auto x = normal(n, 30), w = normal(n), b = normal(n);
    std::vector<float> y(x.size());
    kernels.layer_norm(x.data(), w.data(), b.data(), 1e-5f, n, y.data());
    double mean = 0, variance = 0;
    for (float value : x) mean += value / double(n);
    for (float value : x) variance += (value - mean) * (value - mean) / double(n);
    auto gate = x;
    kernels.silu_mul(gate.data(), w.data(), n);
    for (size_t i = 0; i < x.size(); ++i) {
      CHECK_CLOSE(y[i], (x[i] - mean) / std::sqrt(variance + 1e-5) * w[i] + b[i], 1e-4);
      CHECK_CLOSE(gate[i], x[i] / (1 + std::exp(-double(x[i]))) * w[i],
                  1e-5 * (1 + std::fabs(x[i] * w[i])));
    }
  }
  // bfloat16: round to nearest even, infinities and NaN survive
  const std::vector<float> hard{1.0f + 1.0f / 256, 1.0f + 3.0f / 256, -0.0f, INFINITY, NAN, 3e38f};
  const auto narrow = narrowed<bf16>(kernels, hard);
  CHECK(narrow[0].bits == 0x3f80 && narrow[1].bits == 0x3f82 && narrow[2].bits == 0x8000);
  CHECK(narrow[3].bits == 0x7f80 && std::isnan(widened(narrow[4])) && narrow[5].bits == 0x7f62);
}

// At ten million tokens a float32 angle would be off by half a radian.
void test_rope() {
  const int64_t d = 36, position = 10'000'019;
  const Rope rope(d, 10000.0, 1);
  std::vector<float> table(d);
  rope.angles(position, 1, table.data());
  for (int64_t i = 0; i < d / 2; ++i) {
    const long double angle = position * std::pow(10000.0L, -2.0L * i / d);
    CHECK_CLOSE(table[size_t(2 * i)], double(std::cos(angle)), 1e-7);
    CHECK_CLOSE(table[size_t(2 * i + 1)], double(std::sin(angle)), 1e-7);
  }
}

}  // namespace

int main() {
  std::vector<const Kernels*> sets{&kKernelsBaseline};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    sets.push_back(&kKernelsAvx2);
  }
  if (std::string(kernels().name) == "avx512") sets.push_back(&kKernelsAvx512);
#endif
  for (const Kernels* set : sets) {
    test_gemv<float>(*set);
    test_gemv<bf16>(*set);
    test_attention<float>(*set);
    test_attention<bf16>(*set);
    test_elementwise(*set);
    std::printf("%s: ok\n", set->name);
  }
  test_rope();
}
