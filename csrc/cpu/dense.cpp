#include "dense.h"

#include <algorithm>

// CBLAS, declared here because its header's name and its symbols' prefix differ between builds.
#if !defined(TLINFORMER_CBLAS_PREFIX)
#define TLINFORMER_CBLAS_PREFIX
#endif
#define TLIN_JOIN_(a, b) a##b
#define TLIN_JOIN(a, b) TLIN_JOIN_(a, b)
#define TLIN_BLAS(name) TLIN_JOIN(TLINFORMER_CBLAS_PREFIX, name)
extern "C" {
void TLIN_BLAS(cblas_sgemm)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                            const float* a, int lda, const float* b, int ldb, float beta, float* c,
                            int ldc);
#if TLINFORMER_OPENBLAS
void TLIN_BLAS(openblas_set_num_threads)(int threads);
#endif
}

namespace tlinformer::cpu {
namespace {

// From here on a product streams its weights from the cache hierarchy often enough that CBLAS's
// packing pays; below, reading each weight once for kGemvRows rows is at the memory's speed.
constexpr int64_t kFewRows = 2 * kGemvRows;

}  // namespace

Dense::Dense(DType dtype, int threads, float* panel, int64_t panel_rows)
    : dtype_(dtype), threads_(threads), panel_(panel), panel_rows_(panel_rows) {
#if TLINFORMER_OPENBLAS
  // Our threads split the work; each calls CBLAS on its own tile, so CBLAS must not fork again.
  TLIN_BLAS(openblas_set_num_threads)(1);
#endif
}

void Dense::operator()(const Matrix& w, int64_t begin, int64_t end, const float* x, int64_t m,
                       bool accumulate, float* y, int64_t ldy) const {
  const bool narrow = dtype_ == DType::bfloat16;
  if (m <= kFewRows) {
    if (narrow) return few_rows<bf16>(w, begin, end, x, m, accumulate, y, ldy);
    return few_rows<float>(w, begin, end, x, m, accumulate, y, ldy);
  }
  const int64_t step = narrow ? panel_rows_ : end - begin;
  for (int64_t first = begin; first < end; first += step) {
    const int64_t n = std::min(step, end - first);
    const float* bias = w.bias ? w.bias + first : nullptr;
    const float* matrix = static_cast<const float*>(w.data) + first * w.k;
    if (narrow) {
      const bf16* from = static_cast<const bf16*>(w.data) + first * w.k;
#pragma omp parallel for num_threads(threads_) schedule(static)
      for (int64_t j = 0; j < n; ++j) kernels().b16.widen(from + j * w.k, w.k, panel_ + j * w.k);
      matrix = panel_;
    }
    many_rows(matrix, bias, n, w.k, x, m, accumulate, y + (first - begin), ldy);
  }
}

template <class T>
void Dense::few_rows(const Matrix& w, int64_t begin, int64_t end, const float* x, int64_t m,
                     bool accumulate, float* y, int64_t ldy) const {
#pragma omp parallel for num_threads(threads_) schedule(static)
  for (int64_t thread = 0; thread < threads_; ++thread) {
    const int64_t first = begin + (end - begin) * thread / threads_;
    const int64_t last = begin + (end - begin) * (thread + 1) / threads_;
    // A second pass over the weights, for more rows, should find them in the cache.
    const int64_t step = m > kGemvRows ? 256 : std::max<int64_t>(1, last - first);
    for (int64_t from = first; from < last; from += step) {
      for (int64_t r = 0; r < m; r += kGemvRows) {
        typed<T>(kernels()).gemv(static_cast<const T*>(w.data), w.bias, x + r * w.k, w.k,
                                 std::min(kGemvRows, m - r), w.k, from, std::min(last, from + step),
                                 accumulate, y + r * ldy - begin, ldy);
      }
    }
  }
}

void Dense::many_rows(const float* w, const float* bias, int64_t n, int64_t k, const float* x,
                      int64_t m, bool accumulate, float* y, int64_t ldy) const {
  // A grid of tiles, rows first: measured faster than columns first for tall matrices, although
  // every thread then packs all the weights.
  const int64_t row_parts = std::clamp<int64_t>(m / 48, 1, threads_);
  const int64_t column_parts = std::max<int64_t>(1, threads_ / row_parts);
  const int64_t rows = (m + row_parts - 1) / row_parts;
  const int64_t columns = (n + column_parts - 1) / column_parts;
#pragma omp parallel for num_threads(threads_) schedule(static) collapse(2)
  for (int64_t row_part = 0; row_part < row_parts; ++row_part) {
    for (int64_t column_part = 0; column_part < column_parts; ++column_part) {
      const int64_t r = row_part * rows;
      const int64_t j = column_part * columns;
      const int64_t tile_m = std::min(rows, m - r);
      const int64_t tile_n = std::min(columns, n - j);
      if (tile_m <= 0 || tile_n <= 0) continue;
      float* out = y + r * ldy + j;
      if (bias) {
        for (int64_t i = 0; i < tile_m; ++i) {
          float* line = out + i * ldy;
          for (int64_t c = 0; c < tile_n; ++c)
            line[c] = (accumulate ? line[c] : 0.0f) + bias[j + c];
        }
      }
      constexpr int kRowMajor = 101, kNoTrans = 111, kTrans = 112;
      TLIN_BLAS(cblas_sgemm)
      (kRowMajor, kNoTrans, kTrans, static_cast<int>(tile_m), static_cast<int>(tile_n),
       static_cast<int>(k), 1.0f, x + r * k, static_cast<int>(k), w + j * k, static_cast<int>(k),
       accumulate || bias ? 1.0f : 0.0f, out, static_cast<int>(ldy));
    }
  }
}

}  // namespace tlinformer::cpu
