// The products of a single sequence's token.
#include <cmath>

#include "../rope.cuh"
#include "product.h"
#include "single_row.cuh"

namespace tlinformer::cuda {
namespace {

using namespace step;

// Warps of a block, and slices that each has in flight. More warps have fewer slices each, but more
// sums to be brought together: with two matrices that pays, with one it does not.
constexpr int kProjectWarps = 8, kProjectAhead = 2;
constexpr int kGateWarps = 16, kGateAhead = 1;
constexpr int kAddWarps = 16, kAddAhead = 3;

// Past the L1 cache, as an earlier kernel may have run meanwhile on the same multiprocessor.
__device__ SequenceState load(const SequenceState* from) {
  SequenceState state;
  state.last = __ldcg(&from->last);
  state.history = __ldcg(&from->history);
  state.live = __ldcg(&from->live);
  return state;
}

// norm(x) times the matrices. One warp of the block, the last, gets the 16 outputs of a tile of the
// first matrix in its lanes 0 ... 15, those of the second in the others.
template <class T, int MATRICES, int WARPS, int AHEAD>
class NormedProduct {
 public:
  struct Shared {
    float4 sums[WARPS][MATRICES * kTile];  // of the four vectors
    float2 measures[WARPS];
  };

  __device__ NormedProduct(Shared& shared, const void* const (&matrices)[MATRICES], int outputs,
                           const Norm& norm, const float* x, int width)
      : shared_(shared),
        weights_(matrices, width, outputs),
        row_(norm, x, width),
        epsilon_(norm.epsilon) {}

  static __device__ bool is_last_warp() { return threadIdx.x / 32 == WARPS - 1; }

  __device__ void start() { row_.start(); }
  __device__ void multiply() {
    weights_.multiply(row_);
    const int warp = warp_index(), lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
      float4* const to = &shared_.sums[warp][m * kTile + RowSums::own_output()];
      reinterpret_cast<float2*>(to)[lane % 2] = weights_.sum(m);
    }
    const float2 measures = row_.measures();
    if (lane == 0) shared_.measures[warp] = measures;
    __syncthreads();
  }

  __device__ float output(float per_width) const {
    float4 sum = {0, 0, 0, 0};
    float2 measures = {0, 0};
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
      const float4 part = shared_.sums[warp][threadIdx.x % (MATRICES * kTile)];
      sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
      measures = {measures.x + shared_.measures[warp].x, measures.y + shared_.measures[warp].y};
    }
    return NormOf<T>(measures, per_width, epsilon_).apply(sum);
  }

 private:
  Shared& shared_;
  RowWeights<T, MATRICES, WARPS, AHEAD> weights_;
  FoldedRow<T, WARPS, AHEAD> row_;
  float epsilon_;
};

template <class T>
__global__ void __launch_bounds__(32 * kProjectWarps)
    tlin_project_row(const __grid_constant__ ProjectStep p, float scale, float per_width) {
  let_next_start();
  using Product = NormedProduct<T, 1, kProjectWarps, kProjectAhead>;
  __shared__ typename Product::Shared shared;
  const int outputs = (p.query_heads + 2 * p.kv_heads) * p.head_dim;
  Product product(shared, {p.weight}, outputs, p.norm, p.x, p.hidden_size);
  // Lanes 0 ... 15 of one warp finish; a pair to be rotated is two neighbours.
  const int output = min(static_cast<int>(blockIdx.x * kTile + threadIdx.x % kTile), outputs - 1);
  const unsigned head = static_cast<unsigned>(output) / static_cast<unsigned>(p.head_dim);
  const int element = output - head * p.head_dim;
  const bool is_query = head < p.query_heads,
             is_key = !is_query && head < p.query_heads + p.kv_heads;
  const NewRows& rows = p.new_rows;
  T* const to = static_cast<T*>(is_key ? rows.keys : rows.values) + element +
                (head - p.query_heads - (is_key ? 0 : p.kv_heads)) * rows.head_stride;
  const float bias = to_float(static_cast<const T*>(p.bias)[output]);

  wait_for_previous();
  product.start();
  const SequenceState state = load(p.state);
  const float2 rotation = __ldcg(p.rotations + element / 2);
  product.multiply();
  if (!product.is_last_warp()) return;
  const float own = product.output(per_width) + bias;
  const float other = __shfl_xor_sync(0xffffffffu, own, 1);
  const float turned = own * rotation.x + (output % 2 == 0 ? -other : other) * rotation.y;
  if (threadIdx.x % 32 >= kTile || blockIdx.x * kTile + threadIdx.x % kTile >= outputs ||
      state.live == 0) {
    return;
  }
  if (is_query) {
    p.query[output] = turned * scale;
  } else {
    const int64_t slot = state.last - (rows.follows_history ? 0 : state.history);
    to[slot * p.head_dim] = from_float<T>(is_key ? turned : own);
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kGateWarps)
    tlin_gate_row(const __grid_constant__ GateStep p, float per_width) {
  let_next_start();
  using Product = NormedProduct<T, 2, kGateWarps, kGateAhead>;
  __shared__ typename Product::Shared shared;
  Product product(shared, {p.gate, p.up}, p.intermediate_size, p.norm, p.x, p.hidden_size);
  wait_for_previous();
  product.start();
  const int live = __ldcg(&p.state->live);
  product.multiply();
  if (!product.is_last_warp()) return;
  const float gate = product.output(per_width);
  const float up = __shfl_down_sync(0xffffffffu, gate, kTile);
  const int lane = threadIdx.x % 32, output = blockIdx.x * kTile + lane;
  if (lane >= kTile || output >= p.intermediate_size || live == 0) return;
  static_cast<T*>(p.hidden)[output] = from_float<T>(silu(gate) * up);
}

template <class T>
__global__ void __launch_bounds__(32 * kAddWarps) tlin_add_row(const __grid_constant__ AddStep p) {
  let_next_start();
  __shared__ float shared[kAddWarps][kTile];
  RowWeights<T, 1, kAddWarps, kAddAhead> weights({p.weight}, p.inputs, p.outputs);
  PlainRow<T, kAddWarps, kAddAhead> row(p.input, p.inputs);
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const int output = min(static_cast<int>(blockIdx.x) * kTile + lane % kTile, p.outputs - 1);
  float bias = 0;
  if (p.bias != nullptr) bias = to_float(static_cast<const T*>(p.bias)[output]);

  wait_for_previous();
  row.start();
  const int live = __ldcg(&p.state->live);
  const float x = __ldcg(p.x + output);
  weights.multiply(row);
  const float2 own = weights.sum(0);
  if (lane % 2 == 0) shared[warp][RowSums::own_output()] = own.x;
  __syncthreads();
  if (warp != kAddWarps - 1) return;
  float sum = 0;  // over half of the warps
#pragma unroll
  for (int w = 0; w < kAddWarps / 2; ++w) sum += shared[lane / kTile + 2 * w][lane % kTile];
  sum += __shfl_xor_sync(0xffffffffu, sum, kTile);
  if (lane >= kTile || blockIdx.x * kTile + lane >= p.outputs || live == 0) return;
  p.x[output] = x + (sum + bias);
}

unsigned tiles(int outputs) { return static_cast<unsigned>(ceil_div(outputs, kTile)); }

}  // namespace

void project_row(const ProjectStep& p, const Launch& how) {
  with_type(p.dtype, [&](auto type) {
    const int outputs = (p.query_heads + 2 * p.kv_heads) * p.head_dim;
    launch(how, tlin_project_row<typename decltype(type)::type>, "project_row", tiles(outputs),
           32 * kProjectWarps, 0, p,
           1.4426950408889634f / std::sqrt(static_cast<float>(p.head_dim)),
           1.0f / static_cast<float>(p.hidden_size));
  });
}

void gate_row(const GateStep& p, const Launch& how) {
  with_type(p.dtype, [&](auto type) {
    launch(how, tlin_gate_row<typename decltype(type)::type>, "gate_row",
           tiles(p.intermediate_size), 32 * kGateWarps, 0, p,
           1.0f / static_cast<float>(p.hidden_size));
  });
}

void add_row(const AddStep& p, const Launch& how) {
  with_type(p.dtype, [&](auto type) {
    launch(how, tlin_add_row<typename decltype(type)::type>, "add_row", tiles(p.outputs),
           32 * kAddWarps, 0, p);
  });
}

}  // namespace tlinformer::cuda
