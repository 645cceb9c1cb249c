// Dense products y = x w^T: own kernels for a few rows, CBLAS for many.
#pragma once

#include "kernels.h"
#include "tlinformer/config.h"

namespace tlinformer::cpu {

// A weight matrix (n, k), row-major, of `dtype`; its bias in float32 or null.
struct Matrix {
  const void* data = nullptr;
  const float* bias = nullptr;
  int64_t n = 0;
  int64_t k = 0;
};

class Dense {
 public:
  // `panel` holds panel_rows rows of a matrix in float32, for dtypes that CBLAS does not take.
  Dense(DType dtype, int threads, float* panel, int64_t panel_rows);

  // y[r, j] (+)= x[r] . w[j] + bias[j] for r < m and j in [begin, end); y's column 0 is j = begin.
  void operator()(const Matrix& w, int64_t begin, int64_t end, const float* x, int64_t m,
                  bool accumulate, float* y, int64_t ldy) const;
  void operator()(const Matrix& w, const float* x, int64_t m, bool accumulate, float* y) const {
    (*this)(w, 0, w.n, x, m, accumulate, y, w.n);
  }

 private:
  template <class T>
  void few_rows(const Matrix& w, int64_t begin, int64_t end, const float* x, int64_t m,
                bool accumulate, float* y, int64_t ldy) const;
  void many_rows(const float* w, const float* bias, int64_t n, int64_t k, const float* x, int64_t m,
                 bool accumulate, float* y, int64_t ldy) const;

  DType dtype_;
  int threads_;
  float* panel_;
  int64_t panel_rows_;
};

}  // namespace tlinformer::cpu
