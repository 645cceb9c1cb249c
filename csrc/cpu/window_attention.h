// Both attentions of one layer's window path (paper section 3; two softmaxes, outputs added):
//   output = softmax(causal(query keyᵀ scale)) value + softmax(query context_keyᵀ scale)
//   context_value
// A task is a block of kQueryRows queries of one head. Keys pass it in tiles of kKeyRows, so that a
// tile is read from memory once for the block; a running maximum rescales what is summed so far.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

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

namespace window_attention_detail {

constexpr int64_t kQueryRows = 16;  // 16 x 64 scores and two 64 x 128 float tiles stay in 72 KiB,
constexpr int64_t kKeyRows = 64;    // the second-level cache of any CPU we meet

// Rows of T as rows of A: themselves when the types agree, else a converted copy.
template <class A, class T>
struct Tile {
  const A* data = nullptr;
  int64_t stride = 0;
  std::vector<A> copy;

  void read(const T* rows, int64_t row_stride, int64_t count, int64_t head_dim) {
    if constexpr (std::is_same_v<A, T>) {
      data = rows;
      stride = row_stride;
    } else {
      copy.resize(kKeyRows * head_dim);
      for (int64_t j = 0; j < count; ++j)
        for (int64_t i = 0; i < head_dim; ++i)
          copy[j * head_dim + i] = static_cast<A>(rows[j * row_stride + i]);
      data = copy.data();
      stride = head_dim;
    }
  }
  const A* row(int64_t j) const { return data + j * stride; }
};

template <class A>
A dot(const A* x, const A* y, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// One block of queries of one head; A is the type of the arithmetic.
template <class A, class T>
class Block {
 public:
  Block(const WindowAttention<T>& p, int64_t b, int64_t h, int64_t first_row)
      : p_(p),
        b_(b),
        h_(h),
        kv_head_(h / (p.query_heads / p.kv_heads)),
        first_row_(first_row),
        rows_(std::min(kQueryRows, p.window_rows - first_row)),
        query_(rows_ * p.head_dim),
        sum_(rows_ * p.head_dim),
        output_(rows_ * p.head_dim) {
    for (int64_t r = 0; r < rows_; ++r) {
      const T* row = p.query.at(b, h, first_row + r);
      for (int64_t i = 0; i < p.head_dim; ++i)
        query_[r * p.head_dim + i] = static_cast<A>(row[i]) * static_cast<A>(p.scale);
    }
  }

  // Adds softmax(query keysᵀ) values over `key_rows` keys; causal: over those up to the query's.
  void attend(const HeadRows<const T>& keys, const HeadRows<const T>& values, int64_t key_rows,
              bool causal) {
    std::fill(sum_.begin(), sum_.end(), A(0));
    std::fill_n(weight_, rows_, A(0));
    std::fill_n(maximum_, rows_, -std::numeric_limits<A>::infinity());
    for (int64_t j = 0; j < key_rows; j += kKeyRows) {
      const int64_t count = std::min(kKeyRows, key_rows - j);
      key_.read(keys.at(b_, kv_head_, j), keys.row_stride, count, p_.head_dim);
      value_.read(values.at(b_, kv_head_, j), values.row_stride, count, p_.head_dim);
      for (int64_t r = 0; r < rows_; ++r)
        add_tile(r, causal ? std::min(count, first_row_ + r + 1 - j) : count);
    }
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t i = r * p_.head_dim; i < (r + 1) * p_.head_dim; ++i)
        output_[i] += sum_[i] / weight_[r];
  }

  void write() const {
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t i = 0; i < p_.head_dim; ++i)
        p_.output.at(b_, h_, first_row_ + r)[i] = static_cast<T>(output_[r * p_.head_dim + i]);
  }

 private:
  void add_tile(int64_t r, int64_t count) {
    if (count <= 0) return;
    const int64_t d = p_.head_dim;
    A scores[kKeyRows];
    A maximum = maximum_[r];
    for (int64_t j = 0; j < count; ++j) {
      scores[j] = dot(&query_[r * d], key_.row(j), d);
      maximum = std::max(maximum, scores[j]);
    }
    const A rescale = std::exp(maximum_[r] - maximum);
    A* sum = &sum_[r * d];
    for (int64_t i = 0; i < d; ++i) sum[i] *= rescale;
    A weight = 0;
    for (int64_t j = 0; j < count; ++j) {
      const A w = std::exp(scores[j] - maximum);
      const A* value = value_.row(j);
      weight += w;
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) sum[i] += w * value[i];
    }
    weight_[r] = weight_[r] * rescale + weight;
    maximum_[r] = maximum;
  }

  const WindowAttention<T>& p_;
  const int64_t b_, h_, kv_head_, first_row_, rows_;
  std::vector<A> query_, sum_, output_;  // (rows, d)
  A weight_[kQueryRows], maximum_[kQueryRows];
  Tile<A, T> key_, value_;
};

}  // namespace window_attention_detail

template <class A, class T>
void window_attention(const WindowAttention<T>& p) {
  using window_attention_detail::Block;
  using window_attention_detail::kQueryRows;
#pragma omp parallel for collapse(3) schedule(dynamic)
  for (int64_t b = 0; b < p.batch_size; ++b)
    for (int64_t h = 0; h < p.query_heads; ++h)
      for (int64_t row = 0; row < p.window_rows; row += kQueryRows) {
        Block<A, T> block(p, b, h, row);
        block.attend(p.key, p.value, std::min(row + kQueryRows, p.window_rows), true);
        if (p.context_rows > 0) block.attend(p.context_key, p.context_value, p.context_rows, false);
        block.write();
      }
}

}  // namespace tlinformer::cpu
