// Both attentions of one layer's window path (paper section 3; two softmaxes, outputs added):
//   output = softmax(causal(query keyᵀ scale)) value + softmax(query context_keyᵀ scale)
//   context_value
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace tlinformer::cpu {

// A (batch, heads, rows, d) tensor: strides in elements, the last dimension dense.
template <class T>
struct HeadRows {
  T* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;

  T* at(int64_t b, int64_t h, int64_t row) const {
    return data + b * batch_stride + h * head_stride + row * row_stride;
  }
};

template <class T>
struct WindowAttention {
  HeadRows<const T> query;                       // (B, Hq, M, d)
  HeadRows<const T> key, value;                  // (B, Hkv, M, d)
  HeadRows<const T> context_key, context_value;  // (B, Hkv, N, d), not read when N = 0
  HeadRows<T> output;                            // (B, Hq, M, d)
  int64_t batch_size = 0, query_heads = 0, kv_heads = 0;
  int64_t window_rows = 0, context_rows = 0, head_dim = 0;  // M, N, d
  double scale = 0;
};

// `rows` query rows of one head, from `first` on, by the engine's kernel.
template <class T>
void attend_tiled(const WindowAttention<T>& p, int64_t b, int64_t h, int64_t first, int64_t rows) {
  const TypedKernels<T>& kernel = typed<T>(kernels());
  const int64_t d = p.head_dim, size = rows * d, kv_head = h / (p.query_heads / p.kv_heads);
  std::vector<float> query(size), sum(size), output(size), state(2 * rows);
  std::vector<float> scratch(tile_scratch_floats(d));
  for (int64_t r = 0; r < rows; ++r) kernel.widen(p.query.at(b, h, first + r), d, &query[r * d]);
  for (float& x : query) x *= static_cast<float>(kScoreScale * p.scale);
  const auto add = [&](const HeadRows<const T>& keys, const HeadRows<const T>& values,
                       int64_t count, bool causal) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      state[2 * r] = -std::numeric_limits<float>::infinity();
      state[2 * r + 1] = 0;
    }
    TileArgs<T> args;
    args.q = query.data();
    args.out = sum.data();
    args.state = state.data();
    args.ldq = d;
    args.ld_state = 2;
    args.rows = rows;
    args.k = keys.at(b, kv_head, 0);
    args.v = values.at(b, kv_head, 0);
    args.ldk = keys.row_stride;
    args.ldv = values.row_stride;
    args.end = count;
    args.d = d;
    args.causal = causal;
    args.diagonal = first;
    args.scratch = scratch.data();
    kernel.tile(args);
    for (int64_t i = 0; i < size; ++i) output[i] += sum[i] / state[i / d * 2 + 1];
  };
  add(p.key, p.value, first + rows, true);
  if (p.context_rows > 0) add(p.context_key, p.context_value, p.context_rows, false);
  for (int64_t r = 0; r < rows; ++r) kernel.narrow(&output[r * d], d, p.output.at(b, h, first + r));
}

inline double widened(double x) { return x; }
inline double widened(bf16 x) {
  float wide;
  typed<bf16>(kernels()).widen(&x, 1, &wide);
  return wide;
}
template <class T>
void narrow(double x, T* to) {
  *to = static_cast<T>(x);
}
inline void narrow(double x, bf16* to) {
  const float wide = static_cast<float>(x);
  typed<bf16>(kernels()).narrow(&wide, 1, to);
}

// The same in double and without vectors, for what the kernel does not take: float64, which
// gradient checks need, and heads larger than kMaxHeadDim.
template <class T>
void attend_plain(const WindowAttention<T>& p, int64_t b, int64_t h, int64_t first, int64_t rows) {
  const int64_t d = p.head_dim, kv_head = h / (p.query_heads / p.kv_heads);
  std::vector<double> weights(std::max(p.window_rows, p.context_rows)), output(d);
  for (int64_t row = first; row < first + rows; ++row) {
    const auto add = [&](const HeadRows<const T>& keys, const HeadRows<const T>& values,
                         int64_t count) {
      const T* query = p.query.at(b, h, row);
      double maximum = -std::numeric_limits<double>::infinity(), sum = 0;
      for (int64_t j = 0; j < count; ++j) {
        const T* key = keys.at(b, kv_head, j);
        double score = 0;
        for (int64_t i = 0; i < d; ++i) score += widened(query[i]) * widened(key[i]);
        weights[j] = score * p.scale;
        maximum = std::max(maximum, weights[j]);
      }
      for (int64_t j = 0; j < count; ++j) sum += weights[j] = std::exp(weights[j] - maximum);
      for (int64_t j = 0; j < count; ++j) {
        const T* value = values.at(b, kv_head, j);
        for (int64_t i = 0; i < d; ++i) output[i] += weights[j] / sum * widened(value[i]);
      }
    };
    std::fill(output.begin(), output.end(), 0.0);
    add(p.key, p.value, row + 1);
    if (p.context_rows > 0) add(p.context_key, p.context_value, p.context_rows);
    for (int64_t i = 0; i < d; ++i) narrow(output[i], p.output.at(b, h, row) + i);
  }
}

template <class T>
void window_attention(const WindowAttention<T>& p) {
  const int64_t heads = p.batch_size * p.query_heads;
  if (heads == 0 || p.window_rows == 0) return;
  const int64_t block = rows_per_task(p.window_rows, heads, omp_get_max_threads());
#pragma omp parallel for collapse(3) schedule(dynamic)
  for (int64_t b = 0; b < p.batch_size; ++b)
    for (int64_t h = 0; h < p.query_heads; ++h)
      for (int64_t first = 0; first < p.window_rows; first += block) {
        const int64_t rows = std::min(block, p.window_rows - first);
        if constexpr (!std::is_same_v<T, double>) {
          if (p.head_dim <= kMaxHeadDim) {
            attend_tiled(p, b, h, first, rows);
            continue;
          }
        }
        attend_plain(p, b, h, first, rows);
      }
}

}  // namespace tlinformer::cpu
