// Tiles of gate beside the same columns of up, so that a thread activates what it has.
#include "gated.h"
#include "stationary.cuh"

namespace tlinformer::cuda {
namespace {

constexpr int kPairs = 4;  // 16 bytes of a thread
constexpr int kTogether = 8 * kPairs;

struct Gated {
  Stationary<2> product;  // gate, up
  void* hidden;
};

template <class T>
__global__ void __launch_bounds__(kStationaryThreads, 1)
    tlin_gated_product(const __grid_constant__ Gated p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const int outputs = p.product.outputs;
  const auto store = [&](const float (&c)[128], int64_t row, int column) {
    T* to = static_cast<T*>(p.hidden) + row * outputs + column + threadIdx.x % 4 * (2 * kPairs);
#pragma unroll
    for (int group = 0; group < kTileColumns / kTogether; ++group) {
      if (column + group * kTogether >= outputs) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[kPairs];
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          const int gate = 4 * (kPairs * group + j) + 2 * half, up = gate + 64;
          words[j] = pack<T>(silu(c[gate]) * c[up], silu(c[gate + 1]) * c[up + 1]);
        }
        if (row + 8 * half < p.product.rows) {
          *reinterpret_cast<uint4*>(to + 8 * half * outputs + group * kTogether) = {
              words[0], words[1], words[2], words[3]};
        }
      }
    }
  };
  multiply_stationary<T, 2>(p.product, [](int) {}, store);
#endif
}

}  // namespace

bool takes_gated_product(DType dtype, int64_t inputs, int64_t outputs) {
  bool takes = stationary_takes(inputs, outputs, kTogether);
  with_type(dtype, [&](auto tag) {
    static const bool has = has_products(tlin_gated_product<typename decltype(tag)::type>);
    takes = takes && has;
  });
  return takes;
}

void gated_product(const GatedProduct& p, const Launch& how) {
  require(takes_gated_product(p.dtype, p.inputs, p.outputs), "no kernel multiplies ", p.inputs,
          " inputs by ", p.outputs, " gated outputs here");
  if (p.rows == 0) return;
  const Gated g{
      stationary<2>(p.dtype, p.input, p.rows, p.inputs, {p.gate, p.up}, p.outputs, kPairs),
      p.hidden};
  with_type(p.dtype, [&](auto tag) {
    launch(how, tlin_gated_product<typename decltype(tag)::type>, "gated_product",
           stationary_grid(g.product), kStationaryThreads,
           static_cast<size_t>(g.product.end() + 1024), g);
  });
}

}  // namespace tlinformer::cuda
