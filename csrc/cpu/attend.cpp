#include "attend.h"

#include <algorithm>
#include <cmath>
#include <limits>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace tlinformer::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int64_t kPartKeys = 512;  // fewer keys are not worth a task of their own

int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace

Attend::Attend(const Config& config, DType dtype, int threads, int64_t batch_size, float* second,
               float* softmax)
    : heads_(config.num_attention_heads),
      kv_heads_(config.num_key_value_heads),
      d_(config.head_dim()),
      dtype_(dtype),
      threads_(threads),
      second_(second),
      softmax_(softmax) {
  // The most parts one_row_each makes: every (row, key/value head, cache), each split
  // while that makes fewer than four for a thread.
  const int64_t parts = 2 * (batch_size * kv_heads_ + 4 * threads_);
  parts_.reserve(static_cast<size_t>(parts));
  partials_.resize(static_cast<size_t>(parts * (heads_ / kv_heads_) * (d_ + 2)));
  scratch_.resize(static_cast<size_t>(threads_ * tile_scratch_floats(d_)));
}

void Attend::one_row_each(const std::vector<Queries>& queries) {
  if (dtype_ == DType::bfloat16) return one_row_each_typed<bf16>(queries);
  one_row_each_typed<float>(queries);
}

template <class T>
void Attend::one_row_each_typed(const std::vector<Queries>& queries) {
  const int64_t rows = static_cast<int64_t>(queries.size());
  const int64_t group = heads_ / kv_heads_;
  const int64_t part_floats = group * (d_ + 2);
  const int64_t splits = std::max<int64_t>(1, 4 * threads_ / (rows * kv_heads_));
  parts_.clear();
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t head = 0; head < kv_heads_; ++head) {
      for (int64_t cache = 0; cache < 2; ++cache) {
        const Keys& keys = queries[static_cast<size_t>(row)].keys[cache];
        if (keys.count == 0) continue;
        const int64_t n = std::clamp<int64_t>(keys.count / kPartKeys, 1, splits);
        for (int64_t i = 0; i < n; ++i) {
          parts_.push_back({row, head, cache, keys.begin + keys.count * i / n,
                            keys.begin + keys.count * (i + 1) / n});
        }
      }
    }
  }
  const int64_t count = static_cast<int64_t>(parts_.size());
#pragma omp parallel num_threads(threads_)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) {
      const Part& part = parts_[static_cast<size_t>(i)];
      const Queries& query = queries[static_cast<size_t>(part.row)];
      const Keys& keys = query.keys[part.cache];
      const int64_t offset = part.kv_head * keys.head_stride;
      typed<T>(kernels()).decode(query.q + part.kv_head * group * d_, group,
                                 static_cast<const T*>(keys.k) + offset,
                                 static_cast<const T*>(keys.v) + offset, part.begin, part.end, d_,
                                 partials_.data() + i * part_floats);
    }
    // Merge the parts of a cache by log-sum-exp, add the caches. Parts of one (row, head) are
    // consecutive, and so are those of a cache inside.
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const Part& lead = parts_[static_cast<size_t>(i)];
      const auto same_head = [&](int64_t j) {
        const Part& part = parts_[static_cast<size_t>(j)];
        return part.row == lead.row && part.kv_head == lead.kv_head;
      };
      if (i > 0 && same_head(i - 1)) continue;
      for (int64_t h = 0; h < group; ++h) {
        float* out = queries[static_cast<size_t>(lead.row)].out + (lead.kv_head * group + h) * d_;
        std::fill(out, out + d_, 0.0f);
        const auto state = [&](int64_t j) {
          return partials_.data() + j * part_floats + h * (d_ + 2);
        };
        for (int64_t first = i; first < count && same_head(first);) {
          const int64_t cache = parts_[static_cast<size_t>(first)].cache;
          int64_t last = first;
          float maximum = kMinusInfinity;
          for (;
               last < count && same_head(last) && parts_[static_cast<size_t>(last)].cache == cache;
               ++last) {
            maximum = std::max(maximum, state(last)[0]);
          }
          float total = 0;
          for (int64_t j = first; j < last; ++j) {
            total += state(j)[1] * std::exp2(state(j)[0] - maximum);
          }
          for (int64_t j = first; j < last; ++j) {
            const float weight = std::exp2(state(j)[0] - maximum) / total;
            for (int64_t c = 0; c < d_; ++c) out[c] += weight * state(j)[2 + c];
          }
          first = last;
        }
      }
    }
  }
}

int64_t Attend::piece_keys(int64_t rows) const {
  constexpr int64_t kProducts = int64_t{4} << 30;  // multiply-adds between two polls
  const int64_t keys = kProducts / std::max<int64_t>(1, 2 * rows * heads_ * d_);
  return std::max(kTileKeys, keys / kTileKeys * kTileKeys);
}

void Attend::begin(int64_t rows, float* out) {
#pragma omp parallel for num_threads(threads_) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    std::fill_n(out + row * heads_ * d_, heads_ * d_, 0.0f);
    for (int64_t i = row * heads_; i < (row + 1) * heads_; ++i) {
      softmax_[2 * i] = kMinusInfinity;
      softmax_[2 * i + 1] = 0;
    }
  }
}

void Attend::add_keys(const Queries& queries, const Keys& keys, int64_t from, int64_t to,
                      float* out) {
  if (dtype_ == DType::bfloat16) return add_keys_typed<bf16>(queries, keys, from, to, out);
  add_keys_typed<float>(queries, keys, from, to, out);
}

template <class T>
void Attend::add_keys_typed(const Queries& queries, const Keys& keys, int64_t from, int64_t to,
                            float* out) {
  const int64_t block = rows_per_task(queries.rows, heads_, threads_);
  const int64_t blocks = (queries.rows + block - 1) / block;
#pragma omp parallel for num_threads(threads_) schedule(dynamic)
  for (int64_t task = 0; task < heads_ * blocks; ++task) {
    const int64_t head = task / blocks;
    const int64_t first = task % blocks * block;
    const int64_t offset = head / (heads_ / kv_heads_) * keys.head_stride + keys.begin * d_;
    TileArgs<T> args;
    args.ldq = heads_ * d_;
    args.q = queries.q + first * args.ldq + head * d_;
    args.out = out + first * args.ldq + head * d_;
    args.ld_state = heads_ * 2;
    args.state = softmax_ + first * args.ld_state + head * 2;
    args.rows = std::min(block, queries.rows - first);
    args.k = static_cast<const T*>(keys.k) + offset;
    args.v = static_cast<const T*>(keys.v) + offset;
    args.ldk = args.ldv = d_;
    args.begin = from;
    args.end = to;
    args.d = d_;
    args.causal = keys.causal;
    args.diagonal = keys.count - queries.rows + first;
    args.scratch = scratch_.data() + thread_index() * tile_scratch_floats(d_);
    typed<T>(kernels()).tile(args);
  }
}

void Attend::end(int64_t rows, float* out, float* add_to) {
#pragma omp parallel for num_threads(threads_) schedule(static)
  for (int64_t i = 0; i < rows * heads_; ++i) {
    const float scale = 1.0f / softmax_[2 * i + 1];
    float* to = (add_to ? add_to : out) + i * d_;
    for (int64_t c = 0; c < d_; ++c) to[c] = out[i * d_ + c] * scale + (add_to ? to[c] : 0.0f);
  }
}

}  // namespace tlinformer::cpu
