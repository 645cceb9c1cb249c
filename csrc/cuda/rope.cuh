// Rotary embeddings on interleaved pairs, exact at any position.
#pragma once

#include <cmath>
#include <cstdint>

#include "tlinformer/config.h"

namespace tlinformer::cuda {

// Turns (angle / 2 pi) a position, of each of the d / 2 pairs. Passed to kernels by value.
struct Rope {
  double turns[64];

  static Rope of(const Config& config) {
    Rope rope{};
    const double d = static_cast<double>(config.head_dim());
    for (int64_t i = 0; i < config.head_dim() / 2 && i < 64; ++i) {
      const double pi = 3.14159265358979323846;
      rope.turns[i] = std::pow(config.rope_theta, -2.0 * static_cast<double>(i) / d) / (2 * pi);
    }
    return rope;
  }
};

#if defined(__CUDACC__)
// cos and sin of the angle of a pair at a position. Positions reach millions: the product and its
// reduction are float64 (one multiplication, one rounding), only the rest is float32.
__device__ inline float2 rotation(double turns, int64_t position) {
  const double whole = turns * static_cast<double>(position);
  const float part = static_cast<float>(whole - rint(whole));
  float sine, cosine;
  sincospif(2.0f * part, &sine, &cosine);
  return {cosine, sine};
}

__device__ inline float2 rotate(float2 pair, float2 by) {
  return {pair.x * by.x - pair.y * by.y, pair.x * by.y + pair.y * by.x};
}
#endif

}  // namespace tlinformer::cuda
