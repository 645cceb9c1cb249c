// Rotary embeddings on interleaved pairs.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace tlinformer::cpu {

class Rope {
 public:
  Rope(int64_t head_dim, double theta, int threads) : d_(head_dim), threads_(threads) {
    for (int64_t i = 0; i < d_; i += 2) {
      frequencies_.push_back(std::pow(theta, -static_cast<double>(i) / static_cast<double>(d_)));
    }
  }

  // cos and sin of the angles of positions begin ... begin + rows - 1, (rows, d). Positions reach
  // millions: the angle and its reduction are float64, only the result is float32.
  void angles(int64_t begin, int64_t rows, float* table) const {
#pragma omp parallel for num_threads(threads_) schedule(static) if (rows > 16)
    for (int64_t row = 0; row < rows; ++row) {
      float* to = table + row * d_;
      for (const double frequency : frequencies_) {
        const double angle = static_cast<double>(begin + row) * frequency;
        *to++ = static_cast<float>(std::cos(angle));
        *to++ = static_cast<float>(std::sin(angle));
      }
    }
  }

  // Heads of one row, (heads, d), times `scale`.
  void rotate(const float* from, const float* angles, int64_t heads, float scale, float* to) const {
    for (int64_t h = 0; h < heads; ++h, from += d_, to += d_) {
      for (int64_t i = 0; i < d_; i += 2) {
        const float cosine = angles[i] * scale, sine = angles[i + 1] * scale;
        const float even = from[i], odd = from[i + 1];
        to[i] = even * cosine - odd * sine;
        to[i + 1] = even * sine + odd * cosine;
      }
    }
  }

 private:
  int64_t d_;
  int threads_;
  std::vector<double> frequencies_;
};

}  // namespace tlinformer::cpu
