// Tiles of gate beside the same columns of up, so that a thread activates what it has.
#include "../rows/norm.cuh"
#include "gated.h"
#include "stationary.cuh"

namespace tlinformer::cuda {
namespace {

struct Gated {
  Stationary product;  // gate, up
  GatedProduct call;
};

// A warp's 16 rows, normalised, kAtOnce at a time: loads of all of them are under way, and their
// sums do not wait for one another. A lane has every 32nd piece of 4 values of a row.
template <class T>
__device__ inline void load_normed(const Gated& p, uint32_t inputs) {
  constexpr int kAtOnce = 4, kKept = kMostChunks * kTileInputs / 128;
  const GatedProduct& g = p.call;
  const int lane = threadIdx.x % 32, pieces = p.product.inputs / 4;
  const int first_row = static_cast<int>(threadIdx.x / 32) * 16;
  const int64_t block_row = int64_t{blockIdx.x} * kBlockRows;
  const auto inside = [&](int i) { return lane + 32 * i < pieces; };
  const float size = static_cast<float>(p.product.inputs);
#pragma unroll 1
  for (int own = first_row; own < first_row + 16; own += kAtOnce) {
    // Rows behind the last repeat it: nobody stores what becomes of them.
    const auto row = [&](int r) { return min(block_row + own + r, g.rows - 1); };
    const auto each = [&](const auto& take) {
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
#pragma unroll
        for (int i = 0; i < kKept; ++i) take(r, i);
      }
    };
    float4 x[kAtOnce][kKept];
    const float* from = g.embed != nullptr ? g.branch : g.x;
    each([&](int r, int i) {
      const auto* line = reinterpret_cast<const float4*>(from) + row(r) * pieces + lane;
      x[r][i] = inside(i) ? line[32 * i] : float4{};
    });
    if (g.embed != nullptr) {
      each([&](int r, int i) {
        if (!inside(i)) return;
        const auto* line = static_cast<const uint2*>(g.embed) + g.tokens[row(r)] * int64_t{pieces};
        const float4 e = widened<T>(line[lane + 32 * i]);
        x[r][i] = {x[r][i].x + e.x, x[r][i].y + e.y, x[r][i].z + e.z, x[r][i].w + e.w};
      });
      each([&](int r, int i) {
        if (blockIdx.y > 0 || !inside(i) || block_row + own + r >= g.rows) return;
        reinterpret_cast<float4*>(g.x)[row(r) * pieces + lane + 32 * i] = x[r][i];
      });
    }
    float mean[kAtOnce]{}, scale[kAtOnce]{};
    each([&](int r, int i) { mean[r] += sum_of(x[r][i]); });
    warp_sums(mean);
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) mean[r] /= size;
    each([&](int r, int i) { scale[r] += inside(i) ? squares_of(x[r][i], mean[r]) : 0.0f; });
    warp_sums(scale);
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) scale[r] = rsqrtf(scale[r] / size + g.norm.epsilon);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int input = 4 * (lane + 32 * i);
      if (input >= p.product.chunks * kTileInputs) break;
      uint2 weight{}, bias{};  // zero behind the row
      if (inside(i)) {
        weight = static_cast<const uint2*>(g.norm.weight)[lane + 32 * i];
        bias = static_cast<const uint2*>(g.norm.bias)[lane + 32 * i];
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const uint2 words = normed<T>(x[r][i], mean[r], scale[r], weight, bias);
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(input_place(inputs, own + r, input)),
                     "r"(words.x), "r"(words.y)
                     : "memory");
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kStationaryThreads, 1)
    tlin_gated_product(const __grid_constant__ Gated p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const int outputs = p.product.outputs;
  const auto store = [&](const float (&c)[128], int64_t row, int column) {
    T* to =
        static_cast<T*>(p.call.hidden) + row * outputs + column + threadIdx.x % 4 * (2 * kPairs);
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
  multiply_stationary<T>(p.product, [&](uint32_t inputs) { load_normed<T>(p, inputs); }, store);
#endif
}

}  // namespace

bool takes_gated_product(DType dtype, int64_t inputs, int64_t outputs) {
  bool takes = stationary_takes(inputs, outputs);
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
  const Gated g{stationary(p.dtype, p.rows, p.inputs, {p.gate, p.up}, p.outputs), p};
  with_type(p.dtype, [&](auto tag) {
    launch(how, tlin_gated_product<typename decltype(tag)::type>, "gated_product",
           stationary_grid(g.product), kStationaryThreads, g.product.shared_bytes(), g);
  });
}

}  // namespace tlinformer::cuda
