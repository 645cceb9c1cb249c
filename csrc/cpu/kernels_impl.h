// The vector kernels, written once for any vector width. Each kernels_<isa>.cpp defines TLIN_ISA
// (a namespace), TLIN_LANES, TLIN_TABLE, on x86 TLIN_TARGET, and includes this file. Standard
// headers come before the target pragma: an inline function of theirs compiled for AVX-512 could
// otherwise be the copy the linker keeps for everybody.
#include <cstdint>
#include <limits>

#include "kernels.h"

#define TLIN_PRAGMA(text) _Pragma(#text)
#if defined(TLIN_TARGET)
#if defined(__clang__)
#define TLIN_CLANG(isa) \
  TLIN_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
TLIN_CLANG(TLIN_TARGET)
#else
#pragma GCC push_options
#define TLIN_GCC(isa) TLIN_PRAGMA(GCC target(isa))
TLIN_GCC(TLIN_TARGET)
#endif
#endif
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call that is not inlined
#endif

namespace tlinformer::cpu::TLIN_ISA {
namespace {

constexpr int kLanes = TLIN_LANES;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

#include "simd.h"

// S streams of `count` rows each, far apart in memory: a core reads several long streams faster
// than one, and much faster than rows that lie side by side.
template <int M, int S, class T>
TLIN_INLINE void gemv_streams(const T* w, const float* bias, const float* x, int64_t ldx, int64_t k,
                              int64_t begin, int64_t count, bool accumulate, float* y,
                              int64_t ldy) {
  constexpr int64_t kAhead = 2048 / sizeof(T);  // elements prefetched ahead
  const int64_t whole = k / kLanes * kLanes;
  for (int64_t j = begin; j < begin + count; ++j) {
    VecF acc[M][S] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int s = 0; s < S; ++s) {
        const T* at = w + (j + s * count) * k + i;
        __builtin_prefetch(at + kAhead);
        const VecF weight = load(at);
        for (int r = 0; r < M; ++r) acc[r][s] += weight * load(x + r * ldx + i);
      }
    }
    for (int r = 0; r < M; ++r) {
      for (int s = 0; s < S; ++s) {
        const int64_t column = j + s * count;
        float dot = sum(acc[r][s]);
        for (int64_t i = whole; i < k; ++i) dot += load1(w + column * k + i) * x[r * ldx + i];
        if (bias) dot += bias[column];
        float* out = y + r * ldy + column;
        *out = accumulate ? *out + dot : dot;
      }
    }
  }
}

template <int M, class T>
TLIN_INLINE void gemv_rows(const T* w, const float* bias, const float* x, int64_t ldx, int64_t k,
                           int64_t begin, int64_t end, bool accumulate, float* y, int64_t ldy) {
  constexpr int kStreams = 4;
  const int64_t count = (end - begin) / kStreams, rest = begin + kStreams * count;
  gemv_streams<M, kStreams>(w, bias, x, ldx, k, begin, count, accumulate, y, ldy);
  gemv_streams<M, 1>(w, bias, x, ldx, k, rest, end - rest, accumulate, y, ldy);
}

template <class T>
void gemv(const T* w, const float* bias, const float* x, int64_t ldx, int64_t m, int64_t k,
          int64_t begin, int64_t end, bool accumulate, float* y, int64_t ldy) {
  switch (m) {
    case 1:
      return gemv_rows<1>(w, bias, x, ldx, k, begin, end, accumulate, y, ldy);
    case 2:
      return gemv_rows<2>(w, bias, x, ldx, k, begin, end, accumulate, y, ldy);
    case 3:
      return gemv_rows<3>(w, bias, x, ldx, k, begin, end, accumulate, y, ldy);
    default:
      return gemv_rows<4>(w, bias, x, ldx, k, begin, end, accumulate, y, ldy);
  }
}

template <class T>
void widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = load1(from + i);
}

template <class T>
void narrow(const float* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) store1(to + i, from[i]);
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                float* y) {
  const int64_t whole = n / kLanes * kLanes;
  VecF acc{};
  for (int64_t i = 0; i < whole; i += kLanes) acc += load(x + i);
  float total = sum(acc);
  for (int64_t i = whole; i < n; ++i) total += x[i];
  const float mean = total / static_cast<float>(n);
  acc = VecF{};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const VecF centred = load(x + i) - splat(mean);
    acc += centred * centred;
  }
  float squares = sum(acc);
  for (int64_t i = whole; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < whole; i += kLanes) {
    store(y + i, (load(x + i) - splat(mean)) * splat(scale) * load(weight + i) + load(bias + i));
  }
  for (int64_t i = whole; i < n; ++i) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

void silu_mul(float* gate, const float* up, int64_t n) {
  const float log2e = 1.44269504f, most = 126.0f;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VecF g = load(gate + i);
    const VecF e = exp2(min(g * splat(-log2e), splat(most)));
    store(gate + i, g / (splat(1.0f) + e) * load(up + i));
  }
  for (; i < n; ++i) {
    const float x = gate[i] * -log2e;
    gate[i] = gate[i] / (1.0f + exp2(x < most ? x : most)) * up[i];
  }
}

#include "attend_kernels.h"

template <class T>
constexpr TypedKernels<T> typed_kernels() {
  return {gemv<T>, decode<T>, tile<T>, widen<T>, narrow<T>};
}

}  // namespace
}  // namespace tlinformer::cpu::TLIN_ISA

#if defined(TLIN_TARGET)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#define TLIN_TEXT(name) #name
#define TLIN_NAME(name) TLIN_TEXT(name)

namespace tlinformer::cpu {
const Kernels TLIN_TABLE = {TLIN_NAME(TLIN_ISA), TLIN_ISA::layer_norm, TLIN_ISA::silu_mul,
                            TLIN_ISA::typed_kernels<float>(), TLIN_ISA::typed_kernels<bf16>()};
}  // namespace tlinformer::cpu
