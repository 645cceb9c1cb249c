// The CPU's vector kernels, compiled once per instruction set and chosen when first used.
#pragma once

#include <algorithm>
#include <cstdint>

namespace tlinformer::cpu {

struct bf16 {
  uint16_t bits;
};

// Scores are in base 2: queries come multiplied by log2(e), and softmax uses 2^x.
constexpr float kScoreScale = 1.44269504f;

// One softmax of some query rows of one head over a range of keys. The state (running maximum,
// running sum, unnormalised output) goes in and out, so a range can be split into several calls.
template <class T>
struct TileArgs {
  const float* q = nullptr;  // (rows, d), rows ldq apart, rotated, times kScoreScale / sqrt(d)
  float* out = nullptr;      // (rows, d), rows ldq apart: sum of p v
  float* state = nullptr;    // (rows, 2), rows ld_state apart: maximum, sum of p
  int64_t ldq = 0;
  int64_t ld_state = 0;
  int64_t rows = 0;
  const T* k = nullptr;  // (keys, d), rows ldk apart
  const T* v = nullptr;  // (keys, d), rows ldv apart
  int64_t ldk = 0;
  int64_t ldv = 0;
  int64_t begin = 0;  // keys [begin, end)
  int64_t end = 0;
  int64_t d = 0;
  bool causal = false;  // row r reads keys 0 ... diagonal + r only, whatever the others hold
  int64_t diagonal = 0;
  float* scratch = nullptr;  // tile_scratch_floats(d)
};
constexpr int64_t kTileKeys = 128;
constexpr int64_t kMaxHeadDim = 256;

// Rows of one call: blocks of rows share a tile of packed keys, so large blocks pack less, but
// many blocks balance.
inline int64_t rows_per_task(int64_t rows, int64_t heads, int64_t threads) {
  const int64_t wanted = (4 * threads + heads - 1) / heads;
  return std::clamp<int64_t>((rows + wanted - 1) / wanted, std::min<int64_t>(48, rows), 384);
}
constexpr int64_t tile_scratch_floats(int64_t d) { return kTileKeys * (d + (d + 15) / 16 * 16); }

// The kernels that read tensors of type T (weights and cache); arithmetic is float32.
template <class T>
struct TypedKernels {
  // y[r, j] = x[r] . w[j] (+ bias[j]) (+ y[r, j]) for r < m <= kGemvRows and j in [begin, end).
  void (*gemv)(const T* w, const float* bias, const float* x, int64_t ldx, int64_t m, int64_t k,
               int64_t begin, int64_t end, bool accumulate, float* y, int64_t ldy);
  // One query group (g heads, d apart in q, scaled as above) against keys [begin, end): per head
  // maximum, sum, and d sums of p v, at out + head * (d + 2).
  void (*decode)(const float* q, int64_t g, const T* k, const T* v, int64_t begin, int64_t end,
                 int64_t d, float* out);
  void (*tile)(const TileArgs<T>& args);
  void (*widen)(const T* from, int64_t n, float* to);
  void (*narrow)(const float* from, int64_t n, T* to);
};
constexpr int64_t kGemvRows = 4;

struct Kernels {
  const char* name;  // instruction set
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                     float* y);
  void (*silu_mul)(float* gate, const float* up, int64_t n);  // gate <- silu(gate) * up
  TypedKernels<float> f32;
  TypedKernels<bf16> b16;
};

template <class T>
const TypedKernels<T>& typed(const Kernels& kernels);
template <>
inline const TypedKernels<float>& typed<float>(const Kernels& kernels) {
  return kernels.f32;
}
template <>
inline const TypedKernels<bf16>& typed<bf16>(const Kernels& kernels) {
  return kernels.b16;
}

const Kernels& kernels();  // for this machine

#if defined(__x86_64__)
extern const Kernels kKernelsAvx512;
extern const Kernels kKernelsAvx2;
#endif
extern const Kernels kKernelsBaseline;

}  // namespace tlinformer::cpu
