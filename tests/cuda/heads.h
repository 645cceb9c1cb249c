// Tensors of heads on the device, as attention takes them, for the CUDA tests.
#pragma once

#include <memory>

#include "cuda/attention/prefill_attention.h"
#include "gpu.h"

namespace gpu {

// A (batch, heads, rows, d) tensor on the device with NaN around it and between its parts.
// `interleaved`: rows outside heads, as projections write them; else rows inside heads, as in the
// cache.
template <class T>
struct Tensor {
  Tensor(int64_t batch, int64_t heads, int64_t rows, int d, bool interleaved)
      : heads(heads), rows(rows), d(d), batch(batch) {
    const int64_t spare = 3;
    at.row_stride = interleaved ? heads * d + 8 : d;
    at.head_stride = interleaved ? d : (rows + spare) * d;
    at.batch_stride = interleaved ? (rows + spare) * at.row_stride : heads * at.head_stride + 16;
    values = std::make_unique<Array<T>>(batch * at.batch_stride + 16);
    at.data = values->data() + 8;
  }

  size_t index(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return 8 + b * at.batch_stride + h * at.head_stride + i * at.row_stride + j;
  }

  // Fills it; returns the values as (batch, heads, rows, d).
  std::vector<double> fill(unsigned seed) {
    const std::vector<T> dense = normal<T>(batch * heads * rows * d, seed);
    std::vector<T> all = values->get();
    for_each([&](size_t to, size_t from) { all[to] = dense[from]; });
    values->set(all);
    return doubles(dense);
  }

  // Its values; what lies between them must still be NaN.
  std::vector<double> get() const {
    std::vector<double> all = doubles(values->get());
    std::vector<double> dense(batch * heads * rows * d);
    for_each([&](size_t at, size_t to) {
      dense[to] = all[at];
      all[at] = NAN;
    });
    for (const double x : all) CHECK(std::isnan(x));
    return dense;
  }

  template <class F>
  void for_each(const F& f) const {
    size_t i = 0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t j = 0; j < d; ++j) f(index(b, h, row, j), i++);
  }

  tlinformer::cuda::HeadTensor at{};
  int64_t heads, rows, d, batch;
  std::unique_ptr<Array<T>> values;
};

}  // namespace gpu
